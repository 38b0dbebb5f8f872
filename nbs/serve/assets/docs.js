"use strict";
// The description of the API. The key is kept in a variable: not in storage, a cookie or an address.

const form = document.getElementById("access");
let key = "";

const shown = () => (key.split(".").length === 3 ? { Authorization: `Bearer ${key}` } : { "X-API-Key": key });
const headers = () => (key ? shown() : {});

async function show() {
  const answer = await fetch("/openapi.json", { headers: headers(), cache: "no-store" });
  if (!answer.ok) {
    form.hidden = false;
    document.getElementById("problem").textContent = key ? `refused: ${answer.status}` : "";
    document.getElementById("key").focus();
    return;
  }
  form.hidden = true;
  SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#api",
    deepLinking: true,
    validatorUrl: null,
    requestInterceptor: (request) => ({ ...request, headers: { ...request.headers, ...headers() } }),
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  key = document.getElementById("key").value.trim();
  show();
});
show();

"use strict";
(() => {
  const root = document.documentElement, tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; tip.setAttribute("aria-hidden", "true");

  // Day or night: the system's choice until a reader makes one. A page from a disk may have no storage.
  const kept = { read() { try { return localStorage.getItem("theme"); } catch { return null; } },
                 write(name) { try { localStorage.setItem("theme", name); } catch { /* this page alone, then */ } } };
  const dark = () => root.classList.contains("dark")
    || (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
  function wear(name) {
    root.classList.remove("light", "dark");
    if (name === "light" || name === "dark") root.classList.add(name);
  }
  wear(kept.read());

  function show(point) {
    document.querySelectorAll("circle.here").forEach((other) => other.classList.remove("here"));
    tip.hidden = !point;
    if (!point) return;
    point.classList.add("here");
    tip.textContent = point.getAttribute("aria-label");
    const at = point.getBoundingClientRect(), box = tip.getBoundingClientRect(), middle = at.x + at.width / 2;
    tip.style.left = Math.max(8, Math.min(innerWidth - box.width - 8, middle - box.width / 2)) + "px";
    tip.style.top = (at.y - box.height - 8 > 8 ? at.y - box.height - 8 : at.bottom + 8) + "px";
  }

  function nearest(points, x, y) {
    let best = null, least = 60 * 60;
    for (const point of points) {
      const at = point.getBoundingClientRect(), far = (at.x + at.width / 2 - x) ** 2 + (at.y + at.height / 2 - y) ** 2;
      if (far < least) { least = far; best = point; }
    }
    return best;
  }

  function walk(lines, from, key) {
    const line = lines.findIndex((points) => points.includes(from)), place = lines[line].indexOf(from);
    const along = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: lines[line].length - 1 }[key];
    if (along !== undefined) return lines[line][along];
    const other = lines[line + { ArrowDown: 1, ArrowUp: -1 }[key]];
    return other && other[Math.min(place, other.length - 1)];
  }

  function listen(svg) {
    const lines = [...svg.querySelectorAll("g.series")]
      .map((group) => [...group.querySelectorAll("circle")])
      .filter((points) => points.length);
    const points = lines.flat();
    if (!points.length) return;
    points.forEach((point, i) => point.setAttribute("tabindex", i ? "-1" : "0"));
    svg.addEventListener("pointermove", (event) => show(nearest(points, event.clientX, event.clientY)));
    svg.addEventListener("pointerdown", (event) => show(nearest(points, event.clientX, event.clientY)));
    svg.addEventListener("pointerleave", () => show(null));
    svg.addEventListener("focusin", (event) => show(event.target));
    svg.addEventListener("focusout", () => show(null));
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return show(null);
      if (!["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "Home", "End"].includes(event.key)) return undefined;
      event.preventDefault();
      const next = walk(lines, event.target, event.key);
      if (!next) return undefined;
      event.target.setAttribute("tabindex", "-1"); next.setAttribute("tabindex", "0"); next.focus();
      return undefined;
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.body.append(tip);
    document.querySelectorAll(".plot > svg").forEach(listen);
    const button = document.querySelector(".theme");
    const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
    button.hidden = false; label();
    button.addEventListener("click", () => {
      const name = dark() ? "light" : "dark";
      wear(name); kept.write(name); label();
    });
    document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
    addEventListener("scroll", () => show(null), { passive: true });
  });
})();

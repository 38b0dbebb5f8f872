// Tables that scroll sideways do so by keys as well.
document.addEventListener("DOMContentLoaded", () => {
  for (const wrap of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset .dataframe")) wrap.tabIndex = 0;
});

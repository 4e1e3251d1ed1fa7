adopt(JSON.parse(document.getElementById("data").textContent));
readSlider();
outdate();

document.getElementById("theme").value = repflowTheme.get();
document.addEventListener("theme", () => outdate());
document.addEventListener("input", ({ target }) => {
  if (target.id === "step") showStep();
});
document.addEventListener("change", ({ target }) => {
  if (target.id === "theme") repflowTheme.set(target.value);
  if (target.id?.startsWith("compare-")) outdate(({ figure }) => figure.compare);
});

// On paper: light, as wide as the paper, and complete.
function print(begins) {
  root.classList.toggle("printing", begins);
  if (begins) root.dataset.theme = "light";
  for (const plot of plots.values()) {
    plot.stale = true;
    if (begins) draw(plot);
  }
  if (!begins) repflowTheme.set(repflowTheme.get());
}
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));

if (document.getElementById("content").dataset.version) follow();

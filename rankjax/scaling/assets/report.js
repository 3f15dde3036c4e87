"use strict";
// Only figures of panels that are shown are drawn, one after the other: a page has dozens.
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
function draw(box) {
  if (box.dataset.drawn || !box.offsetParent) return;
  box.dataset.drawn = "yes";
  const spec = JSON.parse(box.querySelector("script").textContent);
  Plotly.newPlot(box, spec.data, spec.layout, config);
}
window.addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach(draw));

let ready = false; // the first panels are shown before anything is drawn
document.querySelectorAll(".switch").forEach((box) => {
  const buttons = [...box.children[0].querySelectorAll("button")];
  const panels = [...box.children].slice(1);
  const show = (chosen) => {
    buttons.forEach((b, i) => b.classList.toggle("on", i === chosen));
    panels.forEach((p, i) => p.classList.toggle("on", i === chosen));
    panels[chosen].querySelectorAll(".plot").forEach((plot) => {
      if (plot.dataset.drawn && plot.offsetParent) Plotly.Plots.resize(plot);
      else if (ready) draw(plot);
    });
  };
  buttons.forEach((b, i) => b.addEventListener("click", () => show(i)));
  show(0);
});

document.querySelectorAll("table.sortable").forEach((table) => {
  table.querySelectorAll("th").forEach((head, column) => {
    let sign = -1;
    head.addEventListener("click", () => {
      sign = -sign;
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        const [m, n] = [parseFloat(x), parseFloat(y)];
        const missing = (isNaN(m) ? 1 : 0) - (isNaN(n) ? 1 : 0);
        if (isNaN(m) && isNaN(n)) return sign * x.localeCompare(y);
        return missing || sign * (m - n);
      };
      [...body.rows].sort(compare).forEach((row) => body.append(row));
    });
  });
});

ready = true;
const queue = [...document.querySelectorAll(".plot")];
(function next() {
  const box = queue.shift();
  if (!box) return;
  draw(box);
  setTimeout(next, 0);
})();

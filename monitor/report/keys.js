const HOVER_MS = 80; // Plotly answers to one of several that come within 50 ms
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

/** The curves of a figure that answer to a pointer. */
function curvesOf({ data }) {
  return data.map((_, number) => number).filter((number) => data[number].hoverinfo !== "skip" && data[number].y.length);
}

/** Where a step from one point of a figure leads: along x, and to another row of a matrix or to another curve. */
function neighbour({ data, layout }, from, [right, up]) {
  const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
  if (data[0].type === "heatmap") {
    const downwards = layout.yaxis.range?.[0] > layout.yaxis.range?.[1];
    const [row, column] = from?.pointNumber ?? [0, 0];
    const moved = from ? [row + (downwards ? -up : up), column + right] : [row, column];
    return { curveNumber: 0, pointNumber: [within(moved[0], data[0].z.length), within(moved[1], data[0].x.length)] };
  }
  const curves = curvesOf({ data });
  if (!from) return { curveNumber: curves[0], pointNumber: 0 };
  const curveNumber = curves[within(curves.indexOf(from.curveNumber) + up, curves.length)];
  return { curveNumber, pointNumber: within(from.pointNumber + right, data[curveNumber].x.length) };
}

/** Shows what a pointer would show, and says it. */
function point(plot, at) {
  plot.at = at;
  const trace = plot.figure.data[at.curveNumber];
  const [row, column] = [at.pointNumber].flat();
  // Plotly finds the cells of a heatmap by their place alone.
  const place = trace.type === "heatmap" ? { xval: trace.x[column], yval: trace.y[row] } : [at];
  Plotly.Fx.hover(plot.element, place);
  setTimeout(() => {
    const lines = [...plot.element.querySelectorAll(".hoverlayer .hovertext tspan.line")];
    document.getElementById("said").textContent = lines.map((line) => line.textContent).join(", ") || "not measured";
  }, HOVER_MS);
}

document.addEventListener("keydown", (event) => {
  const plot = plots.get(event.target);
  const arrow = ARROWS[event.key];
  if (!plot?.drawn || !arrow) return;
  event.preventDefault();
  point(plot, neighbour(plot.figure, plot.at, arrow));
});
document.addEventListener("focusout", ({ target }) => {
  if (plots.get(target)?.drawn) Plotly.Fx.unhover(target);
});

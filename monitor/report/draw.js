/** Element of a figure -> { element, figure, visible, drawn, stale }. */
const plots = new Map();
let figures = {};
/** Number of a run -> what `_frames.frames` made of it. */
let runs = {};

const root = document.documentElement;
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
const idle = (work) =>
  window.requestIdleCallback
    ? requestIdleCallback(work, { timeout: 300 })
    : setTimeout(() => work({ timeRemaining: () => 0 }));

/** A colour of the page, by its name in the style sheet. */
function color(name) {
  return getComputedStyle(root).getPropertyValue(`--${name}`).trim();
}

/** A figure's layout in the page's colours. */
function themed({ layout }, element) {
  const axis = (own) => ({
    ...own,
    title: { ...own.title, standoff: 6, font: { size: 12 } },
    gridcolor: color("grid"),
    linecolor: color("line"),
    zerolinecolor: color("muted"),
    zeroline: own.zeroline ?? false,
    showgrid: !layout.meta.gaps,
  });
  const family = getComputedStyle(document.body).fontFamily;
  const font = { color: color("ink"), family, size: 12 };
  return {
    ...layout,
    ...(root.classList.contains("printing") ? { width: element.clientWidth } : {}),
    xaxis: axis(layout.xaxis),
    yaxis: axis(layout.yaxis),
    shapes: (layout.shapes ?? []).map((shape) => ({ ...shape, line: { ...shape.line, color: color("page") } })),
    paper_bgcolor: color("page"),
    plot_bgcolor: color(layout.meta.gaps ? "missing" : "page"),
    font,
    hoverlabel: { align: "left", bgcolor: color("card"), bordercolor: color("line"), font, namelength: -1 },
    modebar: { bgcolor: color("page"), color: color("muted"), activecolor: color("ink") },
    uirevision: "a change of colours or values keeps the zoom",
  };
}

/** A trace in the page's colours: outlines of markers. */
function outlined(trace) {
  const line = trace.marker?.line;
  return line ? { ...trace, marker: { ...trace.marker, line: { ...line, color: color("page") } } } : trace;
}

/** Heatmaps carry one label per row or per column; hovering wants one per cell. */
function labelCells(trace) {
  if (trace.type !== "heatmap") return;
  const { rows, columns } = trace.meta;
  trace.customdata = rows ? rows.map((label) => trace.x.map(() => label)) : trace.z.map(() => columns);
}

/** Draws a figure if what is drawn is not what should be. */
function draw(plot) {
  const { element, figure } = plot;
  if (!plot.stale) return;
  plot.stale = false;
  const filled = fill(plot);
  element.hidden = !filled;
  if (!filled) return;
  figure.data.forEach(labelCells);
  Plotly[plot.drawn ? "react" : "newPlot"](element, figure.data.map(outlined), themed(figure, element), config);
  plot.drawn = true;
}

/** Has figures drawn anew: those in view at once, the others when the browser has nothing else to do. */
function outdate(which = () => true) {
  delete root.dataset.drawn;
  for (const plot of plots.values()) {
    if (which(plot)) plot.stale = true;
    if (plot.visible) draw(plot);
  }
  idle(drawRest);
}

function drawRest(deadline) {
  for (const plot of plots.values()) {
    if (!plot.stale) continue;
    draw(plot);
    if (deadline.timeRemaining() < 5) {
      idle(drawRest);
      return;
    }
  }
  root.dataset.drawn = "all";
}

const inView = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const plot = plots.get(target);
      if (!plot) continue;
      plot.visible = isIntersecting;
      if (isIntersecting) draw(plot);
    }
  },
  { rootMargin: "300px" },
);

/** Takes over what the page is to show, after its HTML is in place. */
function adopt(data) {
  ({ figures, runs } = data);
  for (const element of [...plots.keys()].filter((known) => !known.isConnected)) {
    inView.unobserve(element);
    Plotly.purge(element);
    plots.delete(element);
  }
  for (const element of document.querySelectorAll(".plot")) {
    const known = plots.get(element);
    if (known) known.figure = figures[element.id];
    else {
      plots.set(element, { element, figure: figures[element.id], visible: false, drawn: false, stale: true });
      inView.observe(element);
    }
  }
}

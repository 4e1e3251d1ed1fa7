"use strict";

(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll("[data-figure]")].map((element) => ({
    element,
    figure: figures[Number(element.dataset.figure)],
  }));
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage", "resetScale2d"]],
  };

  /** A figure's layout in the page's colours. */
  function themed({ layout }) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = (own) => ({
      ...own,
      title: { ...own.title, standoff: 6, font: { size: 12 } },
      gridcolor: color("grid"),
      linecolor: color("line"),
      zeroline: false,
      showgrid: !layout.meta.gaps,
    });
    const family = getComputedStyle(document.body).fontFamily;
    return {
      ...layout,
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
      shapes: (layout.shapes ?? []).map((shape) => ({ ...shape, line: { ...shape.line, color: color("page") } })),
      paper_bgcolor: color("page"),
      plot_bgcolor: color(layout.meta.gaps ? "missing" : "page"),
      font: { color: color("ink"), family, size: 12 },
      hoverlabel: {
        align: "left",
        bgcolor: color("card"),
        bordercolor: color("line"),
        font: { color: color("ink"), family, size: 12 },
        namelength: -1,
      },
      modebar: { bgcolor: color("page"), color: color("muted"), activecolor: color("ink") },
      uirevision: "a change of colours keeps the zoom",
    };
  }

  /** Heatmaps carry one label per row; hovering wants one per cell. */
  function labelCells(trace) {
    if (trace.type === "heatmap") {
      trace.customdata = trace.meta.map((label) => trace.x.map(() => label));
    }
  }

  function nearest(steps, wanted) {
    return steps.reduce(
      (best, step, index) => (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? index : best),
      0,
    );
  }

  /** The whole symmetric matrix from its lower triangle. */
  function mirrored(triangle) {
    return triangle.map((_, row) => triangle.map((_, column) => triangle[Math.max(row, column)][Math.min(row, column)]));
  }

  /** Puts the matrix nearest to a step into every CKA figure that has one. */
  function showCka(step) {
    for (const { element, figure } of plots) {
      if (!figure.cka?.steps.length) continue;
      const index = nearest(figure.cka.steps, step);
      Plotly.restyle(element, { z: [mirrored(figure.cka.triangles[index])] });
      element.dataset.step = figure.cka.steps[index];
      element.closest("figure").querySelector(".shown").textContent = `step ${figure.cka.steps[index].toLocaleString("en")}`;
    }
  }

  function connectSlider(slider) {
    const steps = JSON.parse(slider.dataset.steps);
    const output = document.getElementById("cka-step");
    const move = () => {
      const step = steps[Number(slider.value)];
      output.textContent = `step ${step.toLocaleString("en")}`;
      slider.setAttribute("aria-valuetext", output.textContent);
      showCka(step);
    };
    slider.addEventListener("input", move);
    move();
  }

  for (const { element, figure } of plots) {
    figure.data.forEach(labelCells);
    Plotly.newPlot(element, figure.data, themed(figure), config);
  }
  const slider = document.getElementById("cka-slider");
  if (slider) connectSlider(slider);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const { element, figure } of plots) Plotly.react(element, figure.data, themed(figure), config);
  });
})();

const UNIT = 1e-4; // of the integers that cosines and CKA are stored as

/** The training step that the reader has chosen. */
let chosen = 0;

/** Index of the step nearest to the wanted one. */
function nearest(steps, wanted) {
  return steps.reduce(
    (best, step, index) => (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? index : best),
    0,
  );
}

const decoded = (row) => row.map((value) => (value === null ? null : value * UNIT));
const isEmpty = ({ z }) => z.every((row) => row.every((value) => value === null));
const stepText = (step) => `step ${step.toLocaleString("en")}`;

/** The matrices of a frame: CKA, symmetric, stored as its lower triangle, and positions × blocks. */
const matrices = {
  cka: (run, index) => {
    const triangle = run.cka[index].map(decoded);
    return triangle.map((_, row) => triangle.map((_, column) => triangle[Math.max(row, column)][Math.min(row, column)]));
  },
  tokens: (run, index) => run.tokens[index].map(decoded),
};

/** What puts the chosen step into a figure; each returns the step that it shows. */
const fillers = {
  matrix({ data: [trace], frame }) {
    const run = runs[frame.run];
    const index = nearest(run.steps, chosen);
    trace.z = matrices[frame.what](run, index);
    trace.y = frame.what === "tokens" ? run.positions : trace.z.map((_, row) => row);
    return run.steps[index];
  },
  curves({ data, frame }) {
    for (const trace of data.filter(({ meta }) => meta.run !== undefined)) {
      const run = runs[trace.meta.run];
      const index = nearest(run.steps, chosen);
      trace.y = run.curves[frame.name][index];
      trace.meta = { ...trace.meta, step: run.steps[index].toLocaleString("en") };
    }
    return chosen;
  },
  quantiles({ data: [thin, thick], frame }) {
    const run = runs[frame.run];
    const index = nearest(run.steps, chosen);
    const [lowest, low, median, high, highest] = run.quantiles[frame.name][index];
    const bars = (trace, upper, lower) => {
      const apart = (ends) => ends.map((end, block) => (end === null ? null : Math.abs(end - median[block])));
      trace.error_y = { ...trace.error_y, array: apart(upper), arrayminus: apart(lower) };
      trace.y = median;
    };
    bars(thin, highest, lowest);
    bars(thick, high, low);
    const range = (name, from, to, block) => `${name}: ${from[block]} … ${to[block]}${thick.meta.unit}`;
    thick.text = median.map(
      (_, block) => `${range("half of all", low, high, block)}<br>${range("nine tenths", lowest, highest, block)}`,
    );
    return run.steps[index];
  },
};

/** Puts what is chosen into a figure, and says in its caption what it shows; false if there is nothing to show. */
function fill({ element, figure }) {
  if (!figure.frame && !figure.compare) return true;
  const caption = element.closest("figure").querySelector(".shown");
  if (figure.compare) {
    const { problem, shown } = compare(figure);
    caption.textContent = problem ?? shown;
    return !problem;
  }
  const filler = figure.frame.what in matrices ? fillers.matrix : fillers[figure.frame.what];
  const step = filler(figure);
  element.dataset.step = step;
  const [trace] = figure.data;
  caption.textContent = stepText(step) + (trace.type === "heatmap" && isEmpty(trace) ? ", not measured" : "");
  return true;
}

/** Shows the step at which the slider stands in the figures that follow it. */
function showStep() {
  readSlider();
  outdate(({ figure }) => figure.frame ?? figure.compare);
}

function readSlider() {
  const slider = document.getElementById("step");
  if (!slider) return;
  chosen = JSON.parse(slider.dataset.steps)[Number(slider.value)];
  document.getElementById("shown-step").textContent = stepText(chosen);
  slider.setAttribute("aria-valuetext", stepText(chosen));
}

const SMALLEST_RANGE = 0.01; // of the colours of a difference, so that rounding does not look like one
const NOT_IN_BOTH = "not measured in both";

/** Values ys at places xs, ascending, interpolated linearly at x; null outside of them and beside gaps. */
function interpolated(x, xs, ys) {
  const after = xs.findIndex((place) => place >= x - 1e-9);
  if (after < 0) return null;
  if (Math.abs(xs[after] - x) < 1e-9) return ys[after];
  if (after === 0 || ys[after] === null || ys[after - 1] === null) return null;
  const share = (x - xs[after - 1]) / (xs[after] - xs[after - 1]);
  return ys[after - 1] + share * (ys[after] - ys[after - 1]);
}

/** The two runs that the reader has chosen, each with its frame nearest to the chosen step. */
function chosenPair() {
  return ["A", "B"].map((name) => {
    const number = Number(document.getElementById(`compare-${name}`).value);
    return { number, name, run: runs[number], index: nearest(runs[number].steps, chosen) };
  });
}

/** Which steps of A and B are compared. */
function stepsOf(pair) {
  const [ours, theirs] = pair.map(({ run, index }) => stepText(run.steps[index]));
  return ours === theirs ? ours : `A at ${ours}, B at ${theirs}`;
}

const short = (value) => (value === null ? "n/a" : String(Number(value.toPrecision(4))));

/** Why what is made of HSIC is not compared, if it is not. */
const estimators = (a, b) => (a.run.estimator === b.run.estimator ? null : "not comparable: different estimators");

const nowhere = (a, b) => `no place where both ${a.name} and ${b.name} were measured`;

/** One curve of A minus that of B, both given at places of their own. */
function subtractCurves(figure, [a, b], [xs, ys], [otherXs, otherYs], label) {
  const others = xs.map((x) => interpolated(x, otherXs, otherYs));
  const [trace] = figure.data;
  trace.x = xs;
  trace.y = ys.map((value, index) => (value === null || others[index] === null ? null : value - others[index]));
  trace.customdata = xs.map(
    (x, index) => `${label(x)}<br>A ${short(ys[index])}, B ${short(others[index])}<br>A − B ${short(trace.y[index])}`,
  );
  trace.hovertemplate = "%{customdata}<extra></extra>";
  trace.mode = xs.length > 60 ? "lines" : "lines+markers";
  trace.line = { color: color("ink"), width: 2 };
  return trace.y.every((value) => value === null) ? nowhere(a, b) : null;
}

function compareDepth(figure, [a, b]) {
  const { name } = figure.compare;
  const [ours, theirs] = [a, b].map(({ run, index }) => run.curves[name]?.[index]);
  if (!ours || !theirs) return NOT_IN_BOTH;
  if (name.startsWith("drift") && estimators(a, b)) return estimators(a, b);
  const overStates = ours.length === a.run.depth + 1;
  const alike = a.run.depth === b.run.depth;
  const places = (values, run) => values.map((_, place) => (alike ? place : (place + (overStates ? 0 : 0.5)) / run.depth));
  const thing = overStates ? "state" : "block";
  figure.layout.xaxis = alike
    ? { title: { text: `depth: ${thing} <i>l</i>` }, tickformat: "d" }
    : { title: { text: "relative depth <i>l</i> / <i>L</i>" }, range: [-0.02, 1.02], dtick: 0.25 };
  const label = (x) => `${stepsOf([a, b])}<br>${alike ? `${thing} ${x}` : `relative depth ${x.toFixed(2)}`}`;
  return subtractCurves(figure, [a, b], [places(ours, a.run), ours], [places(theirs, b.run), theirs], label);
}

function compareSteps(figure, [a, b]) {
  const source = Object.values(figures).find(({ series }) => series === figure.compare.name);
  const [ours, theirs] = [a, b].map(({ number }) => source.data.find(({ meta }) => meta?.run === number));
  if (!ours || !theirs) return NOT_IN_BOTH;
  figure.layout.xaxis = { title: { text: "optimizer step" }, range: source.layout.xaxis.range, nticks: 6 };
  return subtractCurves(figure, [a, b], [ours.x, ours.y], [theirs.x, theirs.y], stepText);
}

/** A − B, cell by cell; positions in which only one of them has tokens are left out. */
function subtractMatrices(what, a, b) {
  const [ours, theirs] = [a, b].map(({ run, index }) => matrices[what](run, index));
  const rows = what === "cka" ? ours.map((_, row) => row) : a.run.positions;
  const places = rows.map((place) => (what === "cka" ? place : b.run.positions.indexOf(place)));
  const shared = rows.map((_, row) => row).filter((row) => places[row] >= 0);
  const minus = (value, other) => (value === null || other === null ? null : value - other);
  const z = shared.map((row) => ours[row].map((value, column) => minus(value, theirs[places[row]][column])));
  return { y: shared.map((row) => rows[row]), z };
}

/** The largest difference at any step, so that colours mean the same while the slider moves. */
function largestDifference(what, a, b) {
  const sizes = a.run.steps.map((step, index) => {
    const other = { ...b, index: nearest(b.run.steps, step) };
    return Math.max(0, ...subtractMatrices(what, { ...a, index }, other).z.map((row) => Math.max(...row.map(Math.abs))));
  });
  return Math.max(SMALLEST_RANGE, ...sizes);
}

function compareMatrices(figure, [a, b]) {
  const { what } = figure.compare;
  if (a.run.depth !== b.run.depth) return `not comparable: ${a.run.depth} and ${b.run.depth} blocks`;
  if (what === "cka" && estimators(a, b)) return estimators(a, b);
  const [trace] = figure.data;
  const pair = `${a.number} − ${b.number}`;
  if (figure.pair !== pair) {
    figure.pair = pair;
    trace.zmax = largestDifference(what, a, b);
    trace.zmin = -trace.zmax;
  }
  Object.assign(trace, subtractMatrices(what, a, b));
  if (isEmpty(trace)) return nowhere(a, b);
  trace.x = trace.z.length ? trace.z[0].map((_, column) => column) : [];
  trace.meta = { columns: trace.x.map((column) => `${what === "cka" ? "state" : "block"} ${column}`) };
  const row = what === "cka" ? "compared with state %{y}" : "position %{y:.2f} of the sequence";
  trace.hovertemplate = `%{customdata}<br>${row}<br>A − B %{z:.4~g}<extra></extra>`;
  return null;
}

/** Puts the difference of the chosen runs into a figure; returns what it shows, or the problem that keeps it from it. */
function compare(figure) {
  const pair = chosenPair();
  const how = { curves: compareDepth, steps: compareSteps }[figure.compare.what] ?? compareMatrices;
  const problem = how(figure, pair);
  return { problem, shown: figure.compare.what === "steps" ? "" : stepsOf(pair) };
}

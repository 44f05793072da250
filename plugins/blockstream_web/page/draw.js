// Elements, words for numbers, and the two curves.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element with attributes, listeners (onclick) and children; texts are never taken for HTML. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

export function bytes(n) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let k = 0;
  while (n >= 1024 && k < 4) [n, k] = [n / 1024, k + 1];
  return `${k > 2 ? n.toFixed(1) : Math.round(n)} ${units[k]}`;
}

export function speed(perSecond) {
  return perSecond >= 1e8 ? `${(perSecond / 1e9).toFixed(2)} GB/s` : `${(perSecond / 1e6).toFixed(0)} MB/s`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

// Half as wide where the page is narrow, so that the words keep their size.
const W = matchMedia("(max-width: 560px)").matches ? 340 : 640;
const [H, LEFT, TOP, BOTTOM] = [150, 4, 16, 18];

function axes(label, right, parts) {
  return s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label },
    s("line", { class: "axis", x1: 0, x2: W, y1: H - BOTTOM, y2: H - BOTTOM }), ...parts,
    s("text", { x: LEFT, y: H - 3 }, right[0]), s("text", { x: W, y: H - 3, "text-anchor": "end" }, right[1]));
}

/** Draw what a run has held over time, and its budget where that is near. */
export function memoryCurve(points, budget) {
  const most = Math.max(1, ...points.map((p) => p[1]));
  const near = budget && budget < 3 * most;
  const top = 1.08 * (near ? Math.max(most, budget) : most);
  const end = Math.max(1, points.length ? points.at(-1)[0] : 1);
  const x = (t) => (t / end) * W;
  const y = (n) => TOP + (1 - n / top) * (H - TOP - BOTTOM);
  const line = points.map(([t, n], k) => `${k ? "L" : "M"}${x(t).toFixed(1)} ${y(n).toFixed(1)}`).join("");
  const now = points.length ? points.at(-1)[1] : 0;
  const of = budget ? ` of a budget of ${bytes(budget)}` : "";
  const parts = [];
  if (points.length > 1) {
    parts.push(s("path", { class: "area", d: `${line}L${x(end)} ${H - BOTTOM}L${x(points[0][0])} ${H - BOTTOM}Z` }));
    parts.push(s("path", { class: "curve", d: line }));
  }
  if (near) {
    parts.push(s("line", { class: "limit", x1: 0, x2: W, y1: y(budget), y2: y(budget) }));
    parts.push(s("text", { class: "limit-text", x: W, y: y(budget) - 4, "text-anchor": "end" }, `budget ${bytes(budget)}`));
  }
  parts.push(s("text", { x: LEFT, y: y(most) - 4 }, `at most ${bytes(most)}`));
  return axes(`memory over ${duration(end)}: ${bytes(now)} now, ${bytes(most)} at most${of}`, ["0:00", duration(end)], parts);
}

/** Draw predicted time against budget, and where this plan is. */
export function budgetCurve(plan) {
  const points = plan.curve;
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const most = 1.1 * Math.max(...points.map((p) => p[1]), plan.predicted_s);
  const x = (n) => last > first ? LEFT + ((Math.min(Math.max(n, first), last) - first) / (last - first)) * (W - 2 * LEFT) : W / 2;
  const y = (t) => TOP + (1 - t / most) * (H - TOP - BOTTOM);
  const line = points.map(([n, t], k) => `${k ? "L" : "M"}${x(n).toFixed(1)} ${y(t).toFixed(1)}`).join("");
  const here = x(plan.peak_nbytes);
  return axes(`predicted time against memory: ${plan.advice.join("; ")}`, [bytes(first), bytes(last)], [
    s("path", { class: "curve", d: line }),
    s("circle", { class: "dot", cx: here, cy: y(plan.predicted_s), r: 5 }),
    s("text", { x: here, y: y(plan.predicted_s) - 9, "text-anchor": here > W / 2 ? "end" : "start" }, "this run"),
  ]);
}

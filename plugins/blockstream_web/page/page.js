// The page: what the server tells (runs, the course of the one in progress), and what is asked of it.

import { budgetCurve, bytes, duration, h, memoryCurve, speed } from "./draw.js";
import { body, fill, openForm } from "./form.js";

const $ = (id) => document.getElementById(id);
let listing = { runs: [], more: 0, queue: [] };
let course = { id: "", last: null, curve: [] };
let source = null;
const cards = new Map();
const chosen = new Set();

// -- what is asked of the server

async function ask(method, path, sent) {
  const answer = await fetch(path, { method, body: sent, headers: { "X-Blockstream": "1" } });
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const text = await answer.text();
  let why = text.trim();
  try { why = JSON.parse(text).error; } catch { /* plain text */ }
  throw new Error(why);
}

/** Do what a button asks for, once at a time; what goes wrong is said. */
async function busy(button, action, where = $("said")) {
  if (button.getAttribute("aria-busy") === "true") return;
  button.setAttribute("aria-busy", "true");
  const label = button.textContent;
  if (button.dataset.busy) button.textContent = button.dataset.busy;
  say("", where);
  try {
    await action();
  } catch (error) {
    say(error instanceof TypeError ? "The server cannot be reached." : error.message, where);
  } finally {
    button.removeAttribute("aria-busy");
    if (button.dataset.busy) button.textContent = label;
  }
}

function say(text, where) {
  where.textContent = text;
  where.hidden = !text;
}

function news(text) {
  $("news").textContent = text;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("go"), async () => {
    const { id } = await ask("POST", "/api/runs", body());
    news(`Run ${id} is in the queue.`);
  });
});

$("plan").dataset.busy = "Planning\u2026";
$("plan").addEventListener("click", () => busy($("plan"), async () => {
  $("outlook").replaceChildren();
  showPlan(await ask("POST", "/api/plan", body()));
}));

function showPlan(plan) {
  $("outlook").replaceChildren(
    h("p", { class: "sentence" }, plan.sentence),
    h("figure", {}, budgetCurve(plan), h("figcaption", {}, "predicted time against memory")),
  );
}

function remove(run) {
  $("sure-text").textContent = `Delete run ${run.id} and all that it made?`;
  $("sure").returnValue = "no";
  $("sure").showModal();
  $("sure").onclose = async () => {
    if ($("sure").returnValue !== "yes") return;
    chosen.delete(run.id);
    try { await ask("DELETE", `/api/runs/${run.id}`); } catch (error) { news(error.message); }
    $("gallery").focus();
  };
}

// -- the run in progress

function runOf(id) {
  return listing.runs.find((run) => run.id === id);
}

function showNow() {
  const run = runOf(course.id);
  const open = run && (run.state === "running" || run.state === "stopping");
  const waiting = listing.queue.map(runOf).filter(Boolean);
  $("now").hidden = !open && !waiting.length;
  document.title = open ? `${percent()} \u00b7 blockstream` : "blockstream";
  $("now-run").hidden = !open;
  if (open) showRunning(run);
  $("now-wait").hidden = !waiting.length;
  $("now-wait").textContent = `${waiting.length} ${waiting.length === 1 ? "run waits" : "runs wait"}: ${waiting.map((r) => r.id).join(", ")}`;
}

/** Bring what is shown of the run in progress up to date; its elements stay, so that a press meets its button. */
function showRunning(run) {
  const last = course.last ?? {};
  const stages = Object.keys(last.predicted_s ?? {});
  const at = stages.indexOf(last.stage);
  $("now-title").textContent = `Run ${run.id}`;
  $("now-prompt").textContent = title(run);
  $("stop").disabled = run.state === "stopping";
  $("stop").textContent = run.state === "stopping" ? "Stopping\u2026" : "Stop";
  $("now-stages").replaceChildren(...stages.map((name, k) =>
    h("li", { class: k === at ? "here" : k < at ? "past" : "", "aria-current": k === at ? "step" : null }, name)));
  $("now-part").value = part();
  $("now-part").textContent = percent();
  $("now-stage").textContent = last.stage ?? (stages.length ? "between" : "starting");
  $("now-step").textContent = last.stage ? `${last.pass}${last.passes ? ` of ${last.passes}` : ""}` : "\u2013";
  $("now-left").textContent = last.left_s == null ? "\u2013" : duration(last.left_s);
  $("now-read").textContent = speed(last.read_bytes_per_s ?? 0);
  $("now-held").textContent = last.held_nbytes ? bytes(last.held_nbytes) : "\u2013";
  $("now-budget").textContent = last.budget_nbytes ? `of ${bytes(last.budget_nbytes)}` : "memory";
  $("now-curve").replaceChildren(memoryCurve(course.curve, last.budget_nbytes));
}

$("stop").addEventListener("click", () => busy($("stop"), () => ask("POST", `/api/runs/${course.id}/stop`)));

/** Return how much of the run is done, by the seconds that its stages are predicted to take. */
function part() {
  const last = course.last;
  const predicted = Object.entries(last?.predicted_s ?? {});
  const whole = predicted.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!last?.stage || !whole) return 0;
  let done = 0;
  for (const [name, seconds] of predicted) {
    if (name === last.stage) return (done + seconds * (last.part ?? 0)) / whole;
    done += seconds;
  }
  return 0;
}

function percent() {
  return `${Math.round(100 * part())}%`;
}

// -- the gallery

function prompts(run) {
  return run.prompts?.length ? run.prompts : run.asked.prompts ?? [];
}

function title(run) {
  const all = prompts(run);
  return all.length ? all[0] + (all.length > 1 ? ` and ${all.length - 1} more` : "") : `the prompts of ${run.preset}`;
}

function changes(run) {
  const shown = (value) => Array.isArray(value) ? value.map(shown).join(" + ") || "none" : value?.name ?? String(value);
  const set = Object.entries(run.asked.settings ?? {}).map(([key, value]) => `${key.replaceAll("_", " ")} ${shown(value)}`);
  return [run.preset, ...set, run.has_reference ? "first frame" : null].filter(Boolean).join(" \u00b7 ");
}

function outcome(run) {
  if (run.wall_s == null) return null;
  const passes = run.passes?.[1] ? ` \u00b7 ${run.passes[0]} of ${run.passes[1]} steps` : "";
  const held = run.held ? "" : ", budget broken";
  return `${duration(run.wall_s)} \u00b7 ${bytes(run.peak_nbytes)} of ${bytes(run.budget_nbytes)}${held}${passes}`;
}

function media(run) {
  if (!run.results.length) {
    const what = { waiting: "waits for its turn", running: "being made", stopping: "being stopped", failed: "nothing was made" };
    return h("div", { class: "none" }, what[run.state] ?? "stopped before anything was made");
  }
  const all = prompts(run);
  return h("div", { class: run.results.length > 1 ? "media many" : "media" }, run.results.slice(0, 12).map((path, k) => {
    const [src, alt] = [`/runs/${run.id}/${path}`, all[k] ?? path];
    return path.endsWith(".mp4")
      ? h("video", { src, controls: true, loop: true, muted: true, playsinline: true, preload: "metadata", "aria-label": alt })
      : h("img", { src, alt, loading: "lazy" });
  }));
}

function card(run) {
  const open = ["waiting", "running", "stopping"].includes(run.state);
  const button = (act, label, onclick) => h("button", { type: "button", class: "quiet small", "data-act": act, onclick }, label);
  const post = (what) => (event) => busy(event.currentTarget, () => ask("POST", `/api/runs/${run.id}/${what}`), error);
  const error = h("p", { class: "error", role: run.error ? null : "alert", hidden: !run.error, tabindex: run.error ? 0 : null }, run.error);
  const actions = [
    run.state === "waiting" && button("cancel", "Take out of the queue", post("stop")),
    ["stopped", "failed"].includes(run.state) && button("resume", run.is_begun ? "Resume" : "Try again", post("resume")),
    run.is_begun && !open && h("a", { class: "button quiet small", "data-act": "report", href: `/runs/${run.id}/report.html`, target: "_blank", rel: "noopener" }, "Report"),
    button("again", "Use settings", () => { fill({ preset: run.preset, ...run.asked }); $("prompts").focus(); $("make").scrollIntoView({ block: "nearest" }); }),
    !open && button("delete", "Delete", () => remove(run)),
  ];
  const compare = run.state === "done" && h("label", { class: "tick" },
    h("input", { type: "checkbox", "data-act": "compare", checked: chosen.has(run.id), onchange: (event) => choose(run.id, event.target) }), "Compare");
  return h("article", { class: chosen.has(run.id) ? "run chosen" : "run", "data-id": run.id, "aria-label": `run ${run.id}: ${title(run)}` },
    media(run),
    h("div", { class: "about" },
      h("div", { class: "head" }, h("span", { class: "facts-line" }, run.id), h("span", { class: `state ${run.state}` }, run.state)),
      h("h3", {}, title(run)),
      h("p", { class: "facts-line" }, changes(run)),
      outcome(run) && h("p", { class: "facts-line" }, outcome(run)),
      error, compare, h("div", { class: "actions" }, actions)));
}

function showRuns() {
  const seen = new Set(listing.runs.map((run) => run.id));
  for (const id of chosen) if (!seen.has(id)) chosen.delete(id);
  for (const [id, known] of cards) if (!seen.has(id)) { known.element.remove(); cards.delete(id); }
  let before = null;
  for (const run of [...listing.runs].reverse()) {
    const text = JSON.stringify(run);
    let known = cards.get(run.id);
    if (!known || known.text !== text) {
      const had = known?.element.contains(document.activeElement) ? document.activeElement.dataset.act : null;
      const element = card(run);
      if (known) known.element.replaceWith(element);
      if (known && known.state !== run.state) news(`Run ${run.id}: ${run.state}.`);
      known = { text, element, state: run.state };
      cards.set(run.id, known);
      if (had != null) (element.querySelector(`[data-act=${had}]`) ?? element.querySelector("button, a, input"))?.focus();
    }
    if (known.element.parentElement !== $("cards") || known.element.nextElementSibling !== before) $("cards").insertBefore(known.element, before);
    before = known.element;
  }
  $("empty").hidden = listing.runs.length > 0;
  $("older").hidden = !listing.more;
  $("older").textContent = `${listing.more} older runs are in the folder.`;
  showTray();
}

function choose(id, box) {
  if (box.checked) chosen.add(id);
  else chosen.delete(id);
  while (chosen.size > 2) {
    const oldest = chosen.values().next().value;
    chosen.delete(oldest);
    const other = cards.get(oldest)?.element;
    other?.classList.remove("chosen");
    const tick = other?.querySelector("[data-act=compare]");
    if (tick) tick.checked = false;
  }
  cards.get(id)?.element.classList.toggle("chosen", box.checked);
  showTray();
}

function showTray() {
  const [a, b] = [...chosen].sort();
  $("tray").hidden = !a;
  if (!a) return $("tray").replaceChildren();
  const link = b && h("a", { class: "button small", href: `/compare/${a}/${b}`, target: "_blank", rel: "noopener" }, `Compare ${a} and ${b}`);
  return $("tray").replaceChildren(link || h("span", { class: "soft" }, `${a} and which other?`));
}

// -- what the server tells

function connect() {
  source?.close();
  source = new EventSource("/api/events");
  source.addEventListener("runs", (event) => { listing = JSON.parse(event.data); showRuns(); showNow(); });
  source.addEventListener("course", (event) => { course = JSON.parse(event.data); showNow(); });
  source.addEventListener("sample", (event) => {
    const last = JSON.parse(event.data);
    if (last.id !== course.id) return;
    course.last = last;
    course.curve.push([last.at_s, last.held_nbytes]);
    if (course.curve.length > 1600) course.curve = course.curve.filter((_, k) => k % 2 === 0);
    showNow();
  });
  source.onopen = () => linked("connected", "good");
  source.onerror = () => linked("the server does not answer", "bad");
}

function linked(text, mood) {
  $("link").textContent = text;
  $("link").className = mood;
}

// A browser has few connections to a server: a page that nobody sees gives its own back.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { source?.close(); source = null; } else if (!source) connect();
});

await openForm();
connect();

// The form: made from the presets' fields, read back as what differs from the preset, kept over a reload.

import { h } from "./draw.js";

const KEPT = "blockstream.form";
const $ = (id) => document.getElementById(id);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
let presets = [];
let readers = {};
let count = 0;

export async function openForm() {
  presets = await (await fetch("/api/presets")).json();
  $("preset").replaceChildren(...presets.map((p) => h("option", { value: p.name }, p.name)));
  $("preset").addEventListener("change", () => fill({ preset: $("preset").value, prompts: asked().prompts }));
  $("form").addEventListener("input", keep);
  $("form").addEventListener("change", keep);
  $("reference").addEventListener("change", preview);
  $("preview").querySelector("button").addEventListener("click", () => { $("reference").value = ""; preview(); $("reference").focus(); });
  $("reset").addEventListener("click", () => { fill({ preset: $("preset").value }); keep(); });
  $("prompts").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(KEPT)) ?? {}; } catch { /* nothing is kept */ }
  fill(kept);
}

/** Show a preset with what was asked for: a reload's, or an earlier run's. */
export function fill({ preset, prompts = [], settings = {} }) {
  const one = presets.find((p) => p.name === preset) ?? presets[0];
  $("preset").value = one.name;
  $("prompts-field").hidden = !one.takes_prompts;
  $("prompts").value = prompts.join("\n");
  $("prompts").placeholder = one.prompts[0] ?? "";
  const own = one.prompts.length;
  $("prompts-hint").textContent = own ? `Left empty: the preset's ${own === 1 ? "own prompt" : `own ${own} prompts`}.` : "";
  $("reference-field").hidden = !one.takes_reference;
  readers = {};
  for (const group of ["first", "memory", "more"]) {
    const fields = one.fields.filter((field) => field.group === group);
    const made = fields.map((field) => {
      const value = field.key in settings ? settings[field.key] : one.values[field.key];
      const [element, read] = control(field, value);
      // Compared with what the form itself makes of the preset's value: options that are left out count alike.
      const before = control(field, one.values[field.key])[1]();
      readers[field.key] = () => { const now = read(); return same(now, before) ? undefined : now; };
      return element;
    });
    $(`fields-${group}`).replaceChildren(...made);
  }
}

/** Return what the form asks for: the preset, prompts, and the settings that differ from the preset's. */
export function asked() {
  const settings = {};
  for (const [key, read] of Object.entries(readers)) {
    const value = read();
    if (value !== undefined) settings[key] = value;
  }
  const prompts = $("prompts-field").hidden ? [] : $("prompts").value.split("\n").map((p) => p.trim()).filter(Boolean);
  return { preset: $("preset").value, prompts, settings };
}

/** Return the request's body: a line of JSON, then the image if one is chosen. */
export function body() {
  const parts = [JSON.stringify(asked())];
  const image = $("reference-field").hidden ? null : $("reference").files[0];
  return new Blob(image ? [...parts, "\n", image] : parts);
}

function keep() {
  sessionStorage.setItem(KEPT, JSON.stringify(asked()));
}

function preview() {
  const [image, file] = [$("preview").querySelector("img"), $("reference").files[0]];
  if (image.src) URL.revokeObjectURL(image.src);
  $("preview").hidden = !file;
  if (file) image.src = URL.createObjectURL(file);
  else image.removeAttribute("src");
}

/** Return [element, read] of one field. `read` returns undefined where the config's own default is to hold. */
function control(field, value) {
  const id = `field-${++count}`;
  const hint = field.help ? h("small", { id: `${id}-hint` }, field.help) : null;
  const about = { id, "aria-describedby": hint && `${id}-hint`, "data-key": field.key };
  const wrapped = (input, wide) => h("div", { class: wide ? "field wide" : "field" }, h("label", { for: id }, field.label), input, hint);
  switch (field.kind) {
    case "integer": case "number": {
      const step = field.kind === "integer" ? 1 : "any";
      const input = h("input", { ...about, type: "number", step, min: field.min, max: field.max, value, inputmode: step === 1 ? "numeric" : "decimal" });
      return [wrapped(input), () => input.value === "" ? (field.empty ? null : undefined) : Number(input.value)];
    }
    case "text": {
      const input = h("input", { ...about, type: "text", value, maxlength: 1000, autocomplete: "off", autocapitalize: "off", spellcheck: "false" });
      return [wrapped(input), () => input.value.trim() === "" ? (field.empty ? null : undefined) : input.value.trim()];
    }
    case "switch": {
      const input = h("input", { ...about, type: "checkbox", checked: value === true });
      return [h("div", { class: "field wide" }, h("label", { class: "tick" }, input, field.label), hint), () => input.checked];
    }
    case "choice": {
      const all = field.empty && !field.choices.includes(null) ? [null, ...field.choices] : field.choices;
      const input = h("select", about, all.map((c, k) => h("option", { value: k, selected: same(c, value) }, c == null ? "none" : String(c))));
      return [wrapped(input), () => all[input.value]];
    }
    case "several": {
      const chosen = new Set(value ?? field.default ?? []);
      const ticks = field.choices.map((c) => [c, h("input", { type: "checkbox", checked: chosen.has(c) })]);
      const element = h("fieldset", { class: "wide" }, h("legend", {}, field.label), ticks.map(([c, tick]) => h("label", { class: "tick" }, tick, c)), hint);
      return [element, () => ticks.filter(([, tick]) => tick.checked).map(([c]) => c)];
    }
    case "plugin": return onePlugin(field, value, about, hint);
    default: return severalPlugins(field, value);
  }
}

function named(value) {
  return typeof value === "string" || value == null ? { name: value } : value;
}

/** Return [element, read] of a plugin's options; what is left at its default is not read. */
function options(offer, value) {
  const made = offer.fields.map((field) => [field, ...control(field, value[field.key] ?? field.default)]);
  const read = () => {
    const found = {};
    for (const [field, , one] of made) {
      const now = one();
      if (now !== undefined && !same(now, field.default ?? null)) found[field.key] = now;
    }
    return Object.keys(found).length ? { name: offer.name, ...found } : offer.name;
  };
  const element = h("div", { class: "options", role: "group", "aria-label": `options of ${offer.name}`, hidden: !made.length }, made.map(([, e]) => e));
  return [element, read];
}

function onePlugin(field, value, about, hint) {
  const chosen = named(value);
  const each = field.offers.map((offer) => [offer, ...options(offer, offer.name === chosen.name ? chosen : {})]);
  const input = h("select", about, each.map(([offer], k) => h("option", { value: k, selected: offer.name === chosen.name }, offer.name)));
  const show = () => each.forEach(([offer, element], k) => { element.hidden = String(k) !== input.value || !offer.fields.length; });
  input.addEventListener("change", show);
  show();
  const element = h("div", { class: "field wide" }, h("label", { for: about.id }, field.label), input, hint, each.map(([, e]) => e));
  return [element, () => each[input.value][2]()];
}

function severalPlugins(field, value) {
  const chosen = (value ?? []).map(named);
  const each = field.offers.map((offer) => {
    const own = chosen.find((c) => c.name === offer.name);
    const [element, read] = options(offer, own ?? {});
    const tick = h("input", { type: "checkbox", checked: !!own, "data-key": `${field.key}.${offer.name}` });
    const show = () => { element.hidden = !tick.checked || !offer.fields.length; };
    tick.addEventListener("change", show);
    show();
    return [tick, read, h("div", {}, h("label", { class: "tick" }, tick, offer.name), element)];
  });
  const element = h("fieldset", { class: "wide", hidden: !each.length }, h("legend", {}, field.label), each.map(([, , e]) => e));
  return [element, () => each.filter(([tick]) => tick.checked).map(([, read]) => read())];
}

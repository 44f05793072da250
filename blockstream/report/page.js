"use strict";
// One timeline a run, all with the same view of time. Bars are [start, end, label, stage, pass, retained, bytes].
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const longest = Math.max(1e-6, ...runs.map((run) => run.wall_s));
  const view = { from: 0, to: longest };
  const colours = {};
  const LANES = { load: [42, 32], execute: [98, 32] };
  const MEMORY = [156, 88];
  const HEIGHT = 274;
  const LEAST_S = 1e-5;
  const charts = [];

  function readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["load", "execute", "stall", "outside", "kept", "held", "ink", "soft", "line", "card"]) {
      colours[name] = style.getPropertyValue("--" + name).trim();
    }
  }

  const seconds = (s) =>
    s >= 3600 ? `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`
      : s >= 100 ? `${s.toFixed(0)} s` : s >= 1 ? `${s.toFixed(2)} s` : `${(s * 1000).toPrecision(3)} ms`;
  const bytes = (n) => n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(2)} GiB` : `${(n / 2 ** 20).toFixed(1)} MiB`;

  // The first bar that ends after a time: bars of one lane do not overlap, so both ends are sorted.
  function firstAfter(bars, time) {
    let low = 0, high = bars.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (bars[middle][1] < time) low = middle + 1; else high = middle;
    }
    return low;
  }

  class Chart {
    constructor(host, run) {
      this.host = host;
      this.run = run;
      this.canvas = host.querySelector("canvas");
      this.tip = host.querySelector(".tip");
      this.pointers = new Map();
      this.listen();
    }

    get width() { return this.host.clientWidth; }
    x(time) { return (time - view.from) / (view.to - view.from) * this.width; }
    time(x) { return view.from + x / this.width * (view.to - view.from); }

    draw() {
      const ratio = window.devicePixelRatio || 1;
      const width = this.width;
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(HEIGHT * ratio);
      this.canvas.style.height = `${HEIGHT}px`;
      const pen = this.canvas.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, HEIGHT);
      this.drawStages(pen);
      const [executeY, executeH] = LANES.execute;
      this.drawBars(pen, this.run.bars.outside, executeY + 9, executeH - 18, colours.outside);
      this.drawBars(pen, this.run.bars.stall, executeY + 9, executeH - 18, colours.stall);
      this.drawBars(pen, this.run.bars.load, ...LANES.load, colours.load, true);
      this.drawBars(pen, this.run.bars.execute, ...LANES.execute, colours.execute, true);
      this.drawMemory(pen);
      this.drawAxis(pen);
      pen.font = "12px system-ui, sans-serif";
      pen.textBaseline = "bottom";
      pen.textAlign = "left";
      pen.fillStyle = colours.soft;
      for (const [text, y] of [["load", LANES.load[0]], ["execute", executeY], ["memory", MEMORY[0]]]) {
        pen.fillText(text, 7, y - 3);
      }
    }

    drawStages(pen) {
      pen.font = "12px system-ui, sans-serif";
      pen.textBaseline = "top";
      this.run.stages.forEach(([name, from, to], k) => {
        const left = Math.max(0, this.x(from)), right = Math.min(this.width, this.x(to));
        if (right <= left) return;
        pen.globalAlpha = k % 2 ? 0.05 : 0.1;
        pen.fillStyle = colours.kept;
        pen.fillRect(left, 0, right - left, MEMORY[0] + MEMORY[1]);
        pen.globalAlpha = 1;
        if (right - left > pen.measureText(name).width + 10) {
          pen.fillStyle = colours.ink;
          pen.textAlign = "center";
          pen.fillText(name, (left + right) / 2, 4);
        }
      });
    }

    // Bars narrower than a pixel are drawn together as one: nothing vanishes and nothing is drawn twice.
    drawBars(pen, bars, y, height, colour, marked = false) {
      let done = -1;
      for (let i = firstAfter(bars, view.from); i < bars.length && bars[i][0] <= view.to; i++) {
        const bar = bars[i];
        const left = Math.max(-2, this.x(bar[0])), right = Math.min(this.width + 2, this.x(bar[1]));
        if (right <= done) continue;
        const gap = right - left > 3 ? 0.6 : 0;
        pen.fillStyle = colour;
        pen.fillRect(left, y, Math.max(0.7, right - left - gap), height);
        if (marked && bar[5]) {
          pen.fillStyle = colours.kept;
          pen.fillRect(left, y + height + 1, Math.max(0.7, right - left), 3);
        }
        if (marked && right - left > 60) {
          pen.save();
          pen.beginPath();
          pen.rect(left, y, right - left - 4, height);
          pen.clip();
          pen.fillStyle = colours.card;
          pen.font = "11px system-ui, sans-serif";
          pen.textAlign = "left";
          pen.textBaseline = "middle";
          pen.fillText(bar[2], Math.max(left, 0) + 6, y + height / 2);
          pen.restore();
        }
        done = Math.max(done, left + 0.7 > right ? left + 0.7 : right - 0.01);
      }
    }

    drawMemory(pen) {
      const samples = this.run.memory;
      const [top, height] = MEMORY;
      const most = this.run.memory_top;
      const y = (n) => top + height * (1 - n / most);
      const area = (k, colour) => {
        pen.beginPath();
        pen.moveTo(this.x(samples[0][0]), top + height);
        samples.forEach((s, i) => {
          if (i) pen.lineTo(this.x(s[0]), y(samples[i - 1][k]));
          pen.lineTo(this.x(s[0]), y(s[k]));
        });
        pen.lineTo(this.x(this.run.wall_s), y(samples[samples.length - 1][k]));
        pen.lineTo(this.x(this.run.wall_s), top + height);
        pen.fillStyle = colour;
        pen.fill();
      };
      if (samples.length) {
        area(1, colours.held);
        pen.globalAlpha = 0.6;
        area(2, colours.load);
        pen.globalAlpha = 1;
      }
      if (this.run.budget && this.run.budget <= most) {
        pen.strokeStyle = colours.kept;
        pen.setLineDash([6, 3]);
        pen.beginPath();
        pen.moveTo(0, y(this.run.budget));
        pen.lineTo(this.width, y(this.run.budget));
        pen.stroke();
        pen.setLineDash([]);
        pen.fillStyle = colours.kept;
        pen.font = "12px system-ui, sans-serif";
        pen.textAlign = "right";
        pen.textBaseline = "bottom";
        pen.fillText(`budget ${bytes(this.run.budget)}`, this.width - 6, y(this.run.budget) - 2);
      }
    }

    drawAxis(pen) {
      const y = MEMORY[0] + MEMORY[1];
      const span = view.to - view.from;
      const rough = span / Math.max(3, this.width / 70);
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
      const digits = Math.max(0, -Math.floor(Math.log10(step)));
      pen.fillStyle = colours.soft;
      pen.strokeStyle = colours.line;
      pen.font = "12px system-ui, sans-serif";
      pen.textAlign = "center";
      pen.textBaseline = "top";
      pen.beginPath();
      for (let k = Math.ceil(view.from / step); k * step <= view.to; k++) {
        const x = this.x(k * step);
        pen.moveTo(x, y);
        pen.lineTo(x, y + 5);
        if (x > 16 && x < this.width - 26) pen.fillText(`${(k * step).toFixed(digits)} s`, x, y + 8);
      }
      pen.moveTo(0, y);
      pen.lineTo(this.width, y);
      pen.stroke();
    }

    // -- what a person does ------------------------------------------------------------------

    listen() {
      const host = this.host;
      host.addEventListener("wheel", (event) => {
        // A page that is only scrolled past stays a page.
        if (!event.ctrlKey && !event.metaKey && document.activeElement !== host) return;
        if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
          move(event.deltaX / this.width * (view.to - view.from));
        } else {
          zoom(Math.exp(event.deltaY * 0.0015), this.time(event.offsetX));
        }
        event.preventDefault();
      }, { passive: false });
      host.addEventListener("pointerdown", (event) => {
        host.setPointerCapture(event.pointerId);
        this.pointers.set(event.pointerId, event.offsetX);
        host.classList.add("dragging");
      });
      for (const kind of ["pointerup", "pointercancel"]) {
        host.addEventListener(kind, (event) => {
          this.pointers.delete(event.pointerId);
          if (!this.pointers.size) host.classList.remove("dragging");
        });
      }
      host.addEventListener("pointermove", (event) => this.drag(event));
      host.addEventListener("pointerleave", () => { this.tip.hidden = true; });
      host.addEventListener("dblclick", (event) => zoom(0.4, this.time(event.offsetX)));
      host.addEventListener("keydown", (event) => {
        const width = view.to - view.from;
        const act = {
          ArrowLeft: () => move(-width / 6), ArrowRight: () => move(width / 6),
          "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), 0: reset,
        }[event.key];
        if (act) { act(); event.preventDefault(); }
      });
    }

    drag(event) {
      const before = this.pointers.get(event.pointerId);
      if (before === undefined) { this.showTip(event); return; }
      const others = [...this.pointers.entries()].filter(([id]) => id !== event.pointerId);
      if (others.length) {
        const fixed = others[0][1];
        const was = Math.max(8, Math.abs(before - fixed)), is = Math.max(8, Math.abs(event.offsetX - fixed));
        zoom(was / is, this.time(fixed));
      } else {
        move((before - event.offsetX) / this.width * (view.to - view.from));
      }
      this.pointers.set(event.pointerId, event.offsetX);
      if (event.pointerType === "touch") this.showTip(event);
    }

    showTip(event) {
      const time = this.time(event.offsetX);
      const lines = this.describe(time, event.offsetY);
      this.tip.hidden = !lines.length;
      if (!lines.length) return;
      this.tip.replaceChildren(...lines.map((text) => {
        const line = document.createElement("div");
        line.textContent = text;
        return line;
      }));
      const left = Math.min(event.offsetX + 14, this.width - this.tip.offsetWidth - 6);
      this.tip.style.left = `${Math.max(4, left)}px`;
      this.tip.style.top = `${Math.min(event.offsetY + 14, HEIGHT - this.tip.offsetHeight - 4)}px`;
    }

    describe(time, y) {
      const slack = (view.to - view.from) / this.width;
      const find = (kind) => {
        const bars = this.run.bars[kind];
        const bar = bars[firstAfter(bars, time - slack)];
        return bar && bar[0] <= time + slack ? [kind, bar] : null;
      };
      if (y >= MEMORY[0]) {
        const samples = this.run.memory;
        let i = samples.findIndex((s) => s[0] > time);
        if (i < 0) i = samples.length;
        if (!i || time > this.run.wall_s) return [];
        const [, held, weights] = samples[i - 1];
        return [`${bytes(held)} held`, `${bytes(weights)} of it weights`, `at ${seconds(time)}`];
      }
      const lane = y < LANES.execute[0] - 4 ? ["load"] : ["execute", "stall", "outside"];
      const found = lane.map(find).find(Boolean);
      if (!found) return [];
      const [kind, [from, to, label, stage, pass, kept, size]] = found;
      const lines = [`${kind} ${label}`.trim(), `${seconds(to - from)} from ${seconds(from)}`];
      if (stage) lines.push(`${stage}, pass ${pass + 1}${kept ? ", retained" : ""}`);
      if (size) lines.push(`${bytes(size)} at ${(size / 1e9 / Math.max(to - from, 1e-9)).toFixed(2)} GB/s`);
      return lines;
    }
  }

  function drawAll() { for (const chart of charts) chart.draw(); }

  let asked = 0;
  function redraw() {
    if (asked) return;
    asked = requestAnimationFrame(() => { asked = 0; drawAll(); });
  }

  function show(from, to) {
    const width = Math.min(longest, Math.max(LEAST_S, to - from));
    view.from = Math.min(Math.max(0, from), longest - width);
    view.to = view.from + width;
    document.documentElement.dataset.view = `${view.from} ${view.to}`;
    redraw();
  }
  function move(by) { show(view.from + by, view.to + by); }
  function zoom(factor, around = (view.from + view.to) / 2) {
    const width = Math.min(longest, Math.max(LEAST_S, (view.to - view.from) * factor));
    const part = (around - view.from) / (view.to - view.from);
    show(around - part * width, around - part * width + width);
  }
  function reset() { show(0, longest); }

  document.querySelectorAll(".timeline").forEach((host, k) => charts.push(new Chart(host, runs[k])));
  const acts = { in: () => zoom(0.5), out: () => zoom(2), all: reset };
  document.querySelectorAll("[data-act]").forEach((button) => {
    button.addEventListener("click", () => acts[button.dataset.act]());
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redraw(); });
  new ResizeObserver(redraw).observe(document.body);
  readColours();
  drawAll();
  reset();
})();

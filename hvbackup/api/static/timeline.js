"use strict";
// The timeline of one machine: from years to seconds, with a cursor that names the exact moment.
(() => {
  const root = document.getElementById("timeline");
  if (!root) return;
  const setup = JSON.parse(root.dataset.setup);
  const svg = document.getElementById("band"), over = document.getElementById("overview");
  const panel = document.querySelector(".cursor"), title = document.getElementById("answer"), detail = document.getElementById("detail");
  const NS = "http://www.w3.org/2000/svg", H = 172, TOP = 34, BASE = 118, ms = (s) => Date.parse(s);
  const whole = read(setup.band);
  const end = ms(setup.now), pad = Math.max(1000, (end - whole.first) * 0.02);
  let view = { a: whole.first - pad, b: end + pad }, data = whole, cursor = whole.b, found = null, asked = 0, timer = 0;

  function read(b) {
    const span = (x) => ({ ...x, a: ms(x.from), b: ms(x.to) }), at = (x) => ({ ...x, t: ms(x.time) + 1 });
    return { a: ms(b.from), b: ms(b.to), first: ms(b.first) + 1, points: b.points.map(at), stretches: b.stretches.map(span),
      gaps: b.gaps.map(span), marks: b.marks.map(at), holds: b.holds.map(at),
      verified: b.verified.map(at), oddities: b.oddities.map(at) };
  }
  function el(name, attributes, parent, text) {
    const made = document.createElementNS(NS, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    parent.appendChild(made);
    return made;
  }
  const width = () => svg.clientWidth || 800;
  const x = (t, v = view) => ((t - v.a) / (v.b - v.a)) * width();
  const time = (px) => view.a + (px / width()) * (view.b - view.a);
  const two = (n) => String(n).padStart(2, "0");
  const day = (d) => `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;
  const clock = (d, fine) => `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}${fine ? "." + String(d.getMilliseconds()).padStart(3, "0") : ""}`;
  function stretch(s) {
    if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
    const parts = [[Math.floor(s / 86400), "d"], [Math.floor(s / 3600) % 24, "h"], [Math.floor(s / 60) % 60, "min"], [Math.floor(s) % 60, "s"]];
    const i = parts.findIndex((p) => p[0]);
    return parts.slice(i, i + 2).filter((p) => p[0]).map((p) => p.join(" ")).join(" ");
  }
  const STEPS = [1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 86400, 2 * 86400, 7 * 86400, 14 * 86400, 30 * 86400, 91 * 86400, 365 * 86400].map((s) => s * 1000);
  function ticks() {
    const want = (view.b - view.a) / Math.max(3, width() / 110), step = STEPS.find((s) => s >= want) || STEPS[STEPS.length - 1];
    const zone = new Date(view.a).getTimezoneOffset() * 60000, out = [];
    for (let t = Math.ceil((view.a - zone) / step) * step + zone; t <= view.b; t += step) {
      const d = new Date(t);
      const text = step < 60000 ? clock(d) : step < 86400000 ? `${two(d.getHours())}:${two(d.getMinutes())}` : step < 30 * 86400000 ? day(d).slice(5) : day(d).slice(0, 7);
      const first = step < 86400000 && d.getHours() === 0 && d.getMinutes() === 0 && d.getSeconds() === 0;
      out.push([t, first ? day(d).slice(5) : text]);
    }
    return out;
  }
  function spans(target, list, cls, y, h, v) {
    for (const s of list) {
      const left = Math.max(0, x(s.a, v)), right = Math.min(width(), x(s.b, v));
      if (right < 0 || left > width()) continue;
      const r = el("rect", { class: cls, x: left, y, width: Math.max(cls === "gap" ? 2 : 1, right - left), height: h }, target);
      if (s.why) el("title", {}, r, s.why);
    }
  }
  function draw() {
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width()} ${H}`);
    for (const [t, text] of ticks()) {
      el("line", { class: "tick", x1: x(t), x2: x(t), y1: 18, y2: H - 20 }, svg);
      el("text", { x: x(t), y: H - 5, "text-anchor": "middle" }, svg, text);
    }
    el("rect", { class: "ground", x: 0, y: TOP + 34, width: width(), height: 34, rx: 5 }, svg);
    spans(svg, data.stretches, "moments", TOP + 34, 34, view);
    spans(svg, data.gaps, "gap", TOP + 34, 34, view);
    for (const p of data.points) if (p.t >= view.a && p.t <= view.b) el("circle", { class: "point", cx: x(p.t), cy: BASE - 2, r: 4 }, svg);
    for (const h of data.holds) if (h.t >= view.a && h.t <= view.b) el("title", {}, el("circle", { class: "held", cx: x(h.t), cy: BASE - 2, r: 7.5 }, svg), h.why);
    for (const v of data.verified) {
      const at = x(v.t);
      if (at < -9 || at > width() + 9) continue;
      const sign = v.error ? `M${at - 4} ${BASE + 12}l8 8m0 -8l-8 8` : `M${at - 5} ${BASE + 16}l4 4l7 -8`;
      el("title", {}, el("path", { class: v.error ? "failed" : "verified", d: sign }, svg), v.error || `Its recovery was rehearsed in ${stretch(v.seconds)}`);
    }
    for (const o of data.oddities) {
      const at = x(o.t);
      if (at > -9 && at < width() + 9) el("title", {}, el("path", { class: "odd", d: `M${at} ${TOP - 8}l6 11h-12z` }, svg), o.why);
    }
    let last = -999;
    for (const m of data.marks) {
      const at = x(m.t);
      if (at < -5 || at > width() + 5) continue;
      el("path", { class: "mark", d: `M${at} ${TOP + 14}l6 6l-6 6l-6 -6z` }, svg);
      if (at - last > 90) { el("text", { class: "label", x: at + 9, y: TOP + 24 }, svg, m.tag.slice(0, 24)); last = at; }
    }
    if (end > view.a && end < view.b) el("line", { class: "now", x1: x(end), x2: x(end), y1: 18, y2: H - 20 }, svg);
    if (found && found.time) el("line", { class: "snap", x1: x(ms(found.time)), x2: x(ms(found.time)), y1: TOP + 6, y2: BASE + 12 }, svg);
    el("line", { class: "cursor", x1: x(cursor), x2: x(cursor), y1: 18, y2: H - 22 }, svg);
    el("path", { class: "knob", d: `M${x(cursor) - 7} 8h14v6l-7 8l-7 -8z` }, svg);
    over.replaceChildren();
    const all = { a: whole.first - pad, b: end + pad };
    over.setAttribute("viewBox", `0 0 ${width()} 26`);
    el("rect", { class: "ground", x: 0, y: 4, width: width(), height: 18, rx: 5 }, over);
    spans(over, whole.stretches, "moments", 4, 18, all);
    spans(over, whole.gaps, "gap", 4, 18, all);
    for (const p of whole.points) el("rect", { class: "point", x: x(p.t, all) - 0.75, y: 9, width: 1.5, height: 8 }, over);
    const left = Math.max(0, x(view.a, all)), right = Math.min(width(), x(view.b, all));
    el("rect", { class: "view", x: left, y: 1, width: Math.max(4, right - left), height: 24, rx: 4 }, over);
  }
  async function get(path) {
    const answer = await fetch(`/api/v1/machines/${setup.key}/${path}`, { headers: { Accept: "application/json" } });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    return answer.json();
  }
  const iso = (t) => encodeURIComponent(new Date(t).toISOString());
  let loading = 0;
  function load() {
    clearTimeout(loading);
    loading = setTimeout(async () => {
      const margin = (view.b - view.a) * 0.5;
      try { data = read(await get(`timeline?since=${iso(view.a - margin)}&until=${iso(view.b + margin)}`)); draw(); } catch (e) { detail.textContent = e.message; }
    }, 120);
  }
  function look(t) {
    cursor = Math.min(Math.max(t, whole.first - pad), end);
    found = null; // nothing is ordered for a moment at which the cursor is no more
    asked++;
    const d = new Date(cursor);
    title.textContent = `${day(d)} ${clock(d, false)}`;
    detail.textContent = "…";
    forms();
    draw();
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const mine = ++asked;
      try { const a = await get(`at?time=${iso(cursor)}`); if (mine === asked) tell(a); } catch (e) { detail.textContent = e.message; }
    }, 60);
  }
  function tell(a) {
    found = a;
    const refused = !a.at, d = new Date(refused ? cursor : ms(a.time));
    title.textContent = `${day(d)} ${clock(d, a.kind === "moment")}`;
    panel.classList.toggle("refused", refused);
    const rpo = a.rpo_seconds === null ? "the newest there is" : `the next one came ${stretch(a.rpo_seconds)} later, so no more than that was at risk`;
    const what = a.kind === "point" ? `Recovery point ${a.at}` : `Moment ${a.at}`;
    const behind = a.behind_seconds >= 0.5 ? ` ${stretch(a.behind_seconds)} before the cursor;` : ";";
    detail.textContent = refused ? a.text : `${what},${behind} ${rpo}.`.replace(",;", ";");
    svg.setAttribute("aria-valuetext", `${title.textContent}. ${detail.textContent}`);
    forms();
    draw();
  }
  const quote = (w) => (/^[\w@%+=:,./-]+$/.test(w) ? w : `'${w.replace(/'/g, `'"'"'`)}'`);
  function forms() {
    for (const form of document.querySelectorAll("form.do")) {
      const action = form.dataset.action, at = found && found.at ? found.at : "", button = form.querySelector("button");
      form.elements.at.value = at;
      button.disabled = action === "tag" ? false : !at || (action === "hold" && found.kind !== "point");
      let words = ["hvbackup", action, setup.name, `--at=${at || "latest"}`];
      if (action === "restore") words.push(`--to=${setup.restores}/${form.elements.to.value}`);
      if (action === "boot" && !form.elements.keep_identity.checked) words.push("--new-identity");
      if (action === "tag") words = ["hvbackup", "tag", setup.name, form.elements.tag.value || "NAME"];
      if (action === "hold") words = ["hvbackup", "hold", found && found.kind === "point" ? at : "POINT", ...(form.elements.why.value ? [`--why=${form.elements.why.value}`] : [])];
      const line = form.querySelector(".line");
      line.replaceChildren(...words.flatMap((word, i) => {
        const part = document.createElement("span");
        part.textContent = quote(word);
        return i ? [" ", part] : [part];
      }));
    }
  }
  function range(a, b) {
    const min = 2000, mid = (a + b) / 2;
    if (b - a < min) { a = mid - min / 2; b = mid + min / 2; }
    view = { a, b };
    if (cursor < a || cursor > b) look(Math.min(Math.max(cursor, a), b)); else draw();
    load();
  }
  function zoom(factor, at = cursor) { range(at - (at - view.a) * factor, at + (view.b - at) * factor); }
  function step(direction, far) {
    if (far) {
      const times = data.points.map((p) => p.t), here = found && found.time ? ms(found.time) : cursor;
      const next = direction > 0 ? times.find((t) => t > here + 1) : [...times].reverse().find((t) => t < here - 1);
      if (next !== undefined) go(next);
      return;
    }
    look(cursor + (direction * (view.b - view.a)) / 200);
  }
  function go(t) {
    const half = (view.b - view.a) / 2;
    if (t < view.a || t > view.b) { view = { a: t - half, b: t + half }; load(); }
    look(t);
  }
  // "14:03", "yesterday 22:00", "2026-11-22 14:03:07", "-10m"
  function parse(text) {
    const words = text.trim().toLowerCase(), now = new Date(setup.now);
    const ago = words.match(/^-((?:\d+[smhdw])+)$/), units = { s: 1, m: 60, h: 3600, d: 86400, w: 604800 };
    if (ago) return now - 1000 * [...ago[1].matchAll(/(\d+)([smhdw])/g)].reduce((n, m) => n + m[1] * units[m[2]], 0);
    const at = words.match(/(\d{1,2}):(\d\d)(?::(\d\d))?$/), on = words.match(/(\d{4})-(\d\d)-(\d\d)/);
    if (!at && !on) return NaN;
    const d = new Date(now);
    if (on) d.setFullYear(+on[1], +on[2] - 1, +on[3]);
    if (words.startsWith("yesterday")) d.setDate(d.getDate() - 1);
    if (at) d.setHours(+at[1], +at[2], at[3] ? +at[3] : 0, 0); else d.setHours(23, 59, 59, 999);
    if (!on && !words.startsWith("yesterday") && d > now) d.setDate(d.getDate() - 1);
    return +d + (at && at[3] ? 999 : 0);
  }
  document.getElementById("goto").addEventListener("submit", (e) => {
    e.preventDefault();
    const t = parse(document.getElementById("when").value);
    if (Number.isNaN(t)) { detail.textContent = "Write 14:03, yesterday 22:00, 2026-11-22 14:03, or -10m."; return; }
    const half = Math.min((view.b - view.a) / 2, 1800000);
    view = { a: t - half, b: t + half };
    load();
    look(t);
    svg.focus();
  });
  root.querySelectorAll("[data-range]").forEach((b) => b.addEventListener("click", () => {
    const s = +b.dataset.range * 1000;
    if (!s) range(whole.first - pad, end + pad); else range(Math.min(cursor - s / 2, end + s * 0.05 - s), Math.min(cursor + s / 2, end + s * 0.05));
  }));
  root.querySelectorAll("[data-zoom]").forEach((b) => b.addEventListener("click", () => zoom(+b.dataset.zoom)));
  let held = false;
  const px = (e) => e.clientX - svg.getBoundingClientRect().left;
  svg.addEventListener("pointerdown", (e) => { held = true; svg.setPointerCapture(e.pointerId); look(time(px(e))); });
  svg.addEventListener("pointermove", (e) => { if (held) look(time(px(e))); });
  svg.addEventListener("pointerup", () => { held = false; });
  svg.addEventListener("wheel", (e) => { e.preventDefault(); zoom(e.deltaY > 0 ? 1.25 : 0.8, time(px(e))); }, { passive: false });
  over.addEventListener("pointerdown", (e) => {
    const all = { a: whole.first - pad, b: end + pad }, half = (view.b - view.a) / 2;
    const t = all.a + ((e.clientX - over.getBoundingClientRect().left) / width()) * (all.b - all.a);
    view = { a: t - half, b: t + half };
    load();
    look(t);
  });
  svg.addEventListener("keydown", (e) => {
    const keys = { ArrowLeft: () => step(-1, e.shiftKey), ArrowRight: () => step(1, e.shiftKey), "+": () => zoom(0.5), "-": () => zoom(2), Home: () => go(whole.first), End: () => go(end) };
    if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
  });
  document.querySelectorAll("form.do").forEach((f) => f.addEventListener("input", forms));
  document.querySelectorAll(".jump").forEach((a) => a.addEventListener("click", (e) => { e.preventDefault(); go(Math.ceil(+a.dataset.t / 1e6)); svg.scrollIntoView({ block: "center" }); }));
  addEventListener("resize", draw);
  look(end);
})();

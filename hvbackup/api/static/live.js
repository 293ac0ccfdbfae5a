"use strict";
// Jobs as they go on, by server-sent events.
(() => {
  const live = document.querySelector("[data-live]");
  if (!live) return;
  const signs = { queued: "…", running: "▸", done: "✓", degraded: "!", failed: "✗", cancelled: "–" };
  const spots = [...document.querySelectorAll("[data-job]")];
  const known = new Set(spots.map((s) => s.dataset.job));

  const made = (name, text, style) => {
    const element = document.createElement(name);
    element.textContent = text || "";
    if (style) element.className = style;
    return element;
  };
  const size = (bytes) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    for (; bytes >= 1023.95 && unit < units.length - 1; unit++) bytes /= 1024;
    return `${bytes.toFixed(unit ? 1 : 0)} ${units[unit]}`;
  };
  const showState = (badge, state) => {
    badge.className = `badge ${state}`;
    const sign = made("span", signs[state]);
    sign.ariaHidden = "true";
    badge.replaceChildren(sign, ` ${state}`);
  };
  const showFar = (far, job, withError) => {
    const p = job.progress;
    if (p && p.total_bytes) {
      if (!far.querySelector("progress")) far.replaceChildren(made("progress"), made("small"));
      const [bar, text] = far.children;
      bar.max = p.total_bytes;
      bar.value = p.done_bytes;
      text.textContent = `${Math.floor((100 * p.done_bytes) / p.total_bytes)} % of ${size(p.total_bytes)}`;
    } else if (job.ended) far.replaceChildren(...(withError && job.error ? [made("small", job.error, "why")] : []));
  };

  const events = new EventSource("/api/v1/events");
  events.addEventListener("jobs", (e) => {
    const jobs = new Map(JSON.parse(e.data).jobs.map((j) => [j.id, j]));
    for (const spot of spots) {
      const job = jobs.get(spot.dataset.job);
      if (!job) continue;
      const badge = spot.querySelector(".state .badge"), far = spot.querySelector(".far");
      if (badge && !badge.classList.contains(job.state)) {
        if ("reload" in spot.dataset) { location.reload(); return; }
        showState(badge, job.state);
      }
      if (far) showFar(far, job, !("reload" in spot.dataset));
    }
    const newest = live.dataset.newest;
    if (newest !== undefined) document.getElementById("newer").hidden = ![...jobs.keys()].some((id) => id > newest && !known.has(id));
  });
})();

"use strict";
// Jobs as they go on, by server-sent events.
(() => {
  const spots = document.querySelectorAll("[data-job]");
  if (!spots.length || !document.querySelector("[data-live]")) return;
  const signs = { queued: "…", running: "▸", done: "✓", degraded: "!", failed: "✗", cancelled: "–" };
  const events = new EventSource("/api/v1/events");
  events.addEventListener("jobs", (e) => {
    const jobs = new Map(JSON.parse(e.data).jobs.map((j) => [j.id, j]));
    for (const spot of spots) {
      const job = jobs.get(spot.dataset.job);
      if (!job) continue;
      const badge = spot.querySelector(".state .badge"), far = spot.querySelector(".far");
      if (badge && !badge.classList.contains(job.state)) {
        if ("reload" in spot.dataset) { location.reload(); return; }
        badge.className = `badge ${job.state}`;
        badge.textContent = `${signs[job.state]} ${job.state}`;
      }
      if (!far) continue;
      if (job.progress && job.progress.total_bytes) {
        const bar = far.querySelector("progress") || far.appendChild(document.createElement("progress"));
        bar.max = job.progress.total_bytes;
        bar.value = job.progress.done_bytes;
      } else if (job.ended) far.textContent = job.error || "";
    }
  });
})();

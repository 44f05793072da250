"use strict";
// Every pair's second video follows its first; on a press the second lies on the first and alternates with it.
const pairs = [...document.querySelectorAll(".pair")];
const videos = pairs.map((pair) => [...pair.querySelectorAll("video")]);
const all = videos.flat();
const button = document.querySelector('[data-act="play"]');
let playing = true;

function follow() {
  for (const [first, second] of videos) {
    if (!first || !second || second.readyState < 2) continue;
    const at = Math.min(first.currentTime, second.duration || first.currentTime);
    if (Math.abs(second.currentTime - at) > 0.04) second.currentTime = at;
  }
  if (playing) requestAnimationFrame(follow);
}

function set(on) {
  playing = on;
  button.textContent = on ? "pause" : "play";
  for (const video of all) on ? video.play().catch(() => {}) : video.pause();
  follow();
}

button.addEventListener("click", () => set(!playing));
document.querySelector('[data-act="step"]').addEventListener("click", () => {
  set(false);
  for (const video of all) video.currentTime = (video.currentTime + 1 / 24) % (video.duration || 1);
});
for (const pair of pairs) {
  const press = () => pair.classList.toggle("over");
  pair.addEventListener("click", press);
  pair.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); press(); }
  });
}
set(true);

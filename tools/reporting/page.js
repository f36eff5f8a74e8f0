"use strict";
// A pointer over a chart shows the values of its lines at the nearest x.
const tip = document.getElementById("tip");
for (const chart of document.querySelectorAll("svg[data-hover]")) {
  const { x_label, x: [low, high], box: [left, top, right, bottom], lines } = JSON.parse(chart.dataset.hover);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  cursor.setAttribute("visibility", "hidden");
  chart.append(cursor);
  const nearest = (values, x) => values.reduce((best, v, i) => Math.abs(v - x) < Math.abs(values[best] - x) ? i : best, 0);
  chart.addEventListener("pointermove", (event) => {
    const frame = chart.getBoundingClientRect();
    const place = (event.clientX - frame.left) / frame.width * chart.viewBox.baseVal.width;
    const wanted = low + (place - left) / (right - left) * (high - low);
    const found = lines.map((line) => nearest(line.x, wanted));
    const distances = lines.map((line, i) => Math.abs(line.x[found[i]] - wanted));
    const closest = distances.indexOf(Math.min(...distances));
    const x = lines[closest].x[found[closest]];
    const pixel = left + (x - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", pixel);
    cursor.setAttribute("x2", pixel);
    cursor.setAttribute("visibility", "visible");
    const rows = lines.map((line, i) => `${line.name}: ${line.y[found[i]]}` +
      (line.x[found[i]] === x ? "" : ` (${x_label} ${line.x[found[i]]})`));
    tip.textContent = [`${x_label} ${x}`, ...rows].join("\n");
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, room))}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
  chart.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
}

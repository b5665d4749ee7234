"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  // "var(--name)" anywhere in a figure becomes the colour the page's theme gives that name now.
  const resolve = (value, style) => {
    if (typeof value === "string") {
      const match = /^var\((--[\w-]+)\)$/.exec(value);
      return match ? style.getPropertyValue(match[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolve(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    }
    return value;
  };

  const axis = {
    gridcolor: "var(--line)", zerolinecolor: "var(--line)", linecolor: "var(--line)", tickcolor: "var(--line)",
    automargin: true, title: { standoff: 12 },
  };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 12, b: 8 },
    hoverlabel: { bgcolor: "var(--raised)", bordercolor: "var(--line)", font: { color: "var(--ink)" } },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
    colorway: ["var(--accent)", "var(--second)", "var(--good)", "var(--bad)", "var(--quiet)"],
  };

  const draw = () => {
    if (typeof Plotly === "undefined") return;
    const style = getComputedStyle(root);
    const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: "var(--soft)" };
    for (const canvas of document.querySelectorAll("[data-figure]")) {
      const figure = JSON.parse(document.getElementById(canvas.dataset.figure).textContent);
      const layout = { ...base, font, ...figure.layout };
      for (const name of Object.keys({ xaxis: 0, yaxis: 0, ...layout })) {
        if (/^[xy]axis\d*$/.test(name)) {
          const own = layout[name] || {};
          layout[name] = { ...axis, ...own, title: { ...axis.title, ...own.title } };
        }
      }
      Plotly.react(canvas, resolve(figure.data, style), resolve(layout, style), { responsive: true, displayModeBar: false });
    }
  };

  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); draw(); });
  system.addEventListener("change", () => { label(); draw(); });
  label();
  draw();
})();

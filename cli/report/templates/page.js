(() => {
  "use strict";
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: true };
  // Printed pages are light, whatever the screen is.
  let printing = false;

  function draw() {
    const theme = dark.matches && !printing ? "dark" : "light";
    for (const [key, plot] of Object.entries(plots)) {
      Plotly.react(key, plot.data, plot.layouts[theme], config);
    }
  }

  for (const select of document.querySelectorAll("select[data-plot]")) {
    select.addEventListener("change", () => {
      const shown = new Set(select.value.split(",").map(Number));
      const plot = plots[select.dataset.plot];
      plot.data.forEach((trace, index) => { trace.visible = shown.has(index); });
      draw();
    });
  }
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => { printing = true; draw(); });
  window.addEventListener("afterprint", () => { printing = false; draw(); });
  draw();
})();

// Draws each figure[data-chart] with uPlot: lines over time, or over a number. The page's tables say the same in words.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function draw(figure) {
  const chart = JSON.parse(figure.dataset.chart);
  const axis = { stroke: colour("ink"), grid: { stroke: colour("grid"), width: 1 }, ticks: { stroke: colour("grid") } };
  const series = chart.lines.map((line) => ({
    label: line.name,
    stroke: colour(line.colour),
    width: 2,
    dash: line.dash ? [6, 4] : undefined,
    points: { show: chart.x.length < 40 },
  }));
  const options = {
    width: figure.clientWidth,
    height: 220,
    scales: { x: { time: !chart.numeric } },
    axes: [axis, { ...axis, size: 64 }],
    series: [{}, ...series],
  };
  figure.querySelector(".uplot")?.remove();
  new uPlot(options, [chart.x, ...chart.lines.map((line) => line.values)], figure);
}

const drawAll = () => document.querySelectorAll("figure[data-chart]").forEach(draw);
drawAll();
addEventListener("resize", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

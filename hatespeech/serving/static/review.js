// Keys: 1, 2, 3 a label, n the next, u undo, s show the text. Not while a field has the focus.
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "s") document.querySelector("details.veiled")?.toggleAttribute("open");
  document.querySelector(`[data-key="${CSS.escape(event.key)}"]`)?.click();
});

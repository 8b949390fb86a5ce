// A file dropped anywhere on the form is the chosen one; a running file's progress is asked for once a second.
const form = document.querySelector("form.drop");
form?.addEventListener("dragover", (event) => event.preventDefault());
form?.addEventListener("drop", (event) => {
  event.preventDefault();
  form.elements.file.files = event.dataTransfer.files;
});

const running = document.querySelector("[data-progress]");
async function look() {
  const state = await (await fetch(running.dataset.progress)).json();
  running.querySelector("progress").value = state.done;
  running.querySelector("[data-done]").textContent = state.done;
  if (state.running) setTimeout(look, 1000);
  else location.reload();
}
if (running) setTimeout(look, 1000);

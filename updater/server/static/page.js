// Two small helps that HTML has no words for: questions before what can't be undone, and uploads
// as a stream (a form would send multipart, which the server would have to unpack).
"use strict";
document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});
const form = document.getElementById("upload");
if (form) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const file = form.querySelector("input").files[0];
    const bar = form.querySelector("progress");
    const said = form.querySelector("[role=status]");
    const button = form.querySelector("button");
    const request = new XMLHttpRequest();
    request.open("POST", "/artifacts");
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (progress) => { bar.value = 100 * progress.loaded / progress.total; };
    request.onloadend = () => {
      bar.hidden = true;
      button.disabled = false;
      if (request.status === 201) { window.location.reload(); return; }
      let message = "the connection broke";
      try {
        const page = new DOMParser().parseFromString(request.responseText, "text/html");
        const alert = page.querySelector("[role=alert]");
        message = alert ? alert.textContent : JSON.parse(request.responseText).error;
      } catch { /* keep the first message */ }
      said.textContent = `Not uploaded: ${message}`;
      said.className = "alert";
    };
    bar.hidden = false;
    button.disabled = true;
    said.textContent = "";
    said.className = "";
    request.send(file);
  });
}

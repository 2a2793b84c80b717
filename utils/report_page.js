"use strict";
// Pictures of a row beside those of the reference: a slider that wipes between them and a map of
// their difference. The pictures are those of the page's own <img> strips: equal squares in a row.

function square(strip, k, canvas) {
  const side = strip.naturalHeight;
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(strip, k * side, 0, side, side, 0, 0, side, side);
  return context.getImageData(0, 0, side, side);
}

function difference(a, b, gain, canvas) {
  const context = canvas.getContext("2d");
  canvas.width = b.width;
  canvas.height = b.height;
  if (!a || a.width !== b.width) return "no reference of this size";
  const map = context.createImageData(b.width, b.height);
  let squares = 0, largest = 0;
  for (let i = 0; i < b.data.length; i++) {
    if (i % 4 === 3) { map.data[i] = 255; continue; }
    const apart = Math.abs(a.data[i] - b.data[i]);
    squares += apart * apart;
    largest = Math.max(largest, apart);
    map.data[i] = apart * gain;  // clamped to 255
  }
  context.putImageData(map, 0, 0);
  if (largest === 0) return "identical";
  const psnr = 10 * Math.log10(255 * 255 / (squares / (b.width * b.height * 3)));
  return `PSNR ${psnr.toFixed(1)} dB, largest difference ${largest} of 255`;
}

function start(viewer) {
  const part = (name) => viewer.querySelector(`[data-part="${name}"]`);
  const [row, picture, gain, wipe] = ["row", "picture", "gain", "wipe"].map(part);

  function cut() {
    part("over").style.clipPath = `inset(0 0 0 ${wipe.value}%)`;
    part("seam").style.left = `${wipe.value}%`;
  }

  async function show() {
    const chosen = row.selectedOptions[0];
    const strip = document.getElementById(chosen.dataset.strip);
    const reference = document.getElementById(chosen.dataset.reference);
    await Promise.all([strip, reference].filter(Boolean).map((img) => img.decode()));
    const count = Math.max(1, Math.round(strip.naturalWidth / strip.naturalHeight));
    const k = Math.min(picture.selectedIndex < 0 ? 0 : picture.selectedIndex, count - 1);
    picture.replaceChildren(...Array.from({ length: count }, (_, i) => new Option(`${i + 1}`)));
    picture.selectedIndex = k;
    const b = square(strip, k, part("result"));
    square(strip, k, part("over"));
    const a = reference ? square(reference, k, part("reference")) : null;
    square(reference || strip, k, part("under"));
    part("said").textContent = difference(a, b, Number(gain.value), part("difference"));
    part("chosen").textContent = chosen.textContent;
    cut();
  }

  for (const control of [row, picture, gain]) control.addEventListener("change", show);
  wipe.addEventListener("input", cut);
  part("stage").addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch" || event.buttons) {
      const box = part("stage").getBoundingClientRect();
      wipe.value = 100 * (event.clientX - box.left) / box.width;
      cut();
    }
  });
  viewer.hidden = false;
  show().catch((error) => { part("said").textContent = `cannot be drawn: ${error.message}`; });
}

document.querySelectorAll(".viewer").forEach(start);

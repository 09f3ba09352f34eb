// A word with data-grid, bytes of a square grid, darkens its card's picture where the grid is low.
// One word of a sentence takes part in the tab order; the arrow keys go on from there.
function gridded(event) {
  return event.target.closest && event.target.closest('[data-grid]');
}

function canvasOf(word) {
  return word.closest('.card').querySelector('canvas');
}

function shade(event) {
  const word = gridded(event);
  if (!word) return;
  const grid = Uint8Array.from(atob(word.dataset.grid), letter => letter.charCodeAt(0));
  const canvas = canvasOf(word), brush = canvas.getContext('2d');
  canvas.width = canvas.height = Math.sqrt(grid.length);
  const pixels = brush.createImageData(canvas.width, canvas.height);
  grid.forEach((value, i) => { pixels.data[4 * i + 3] = 190 - 0.74 * value; });
  brush.putImageData(pixels, 0, 0);
  canvas.classList.add('on');
}

function clear(event) {
  const word = gridded(event);
  if (word) canvasOf(word).classList.remove('on');
}

function move(event) {
  const word = gridded(event), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!word || !step) return;
  const words = [...word.parentElement.querySelectorAll('[data-grid]')], next = words[words.indexOf(word) + step];
  if (!next) return;
  word.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

for (const kind of ['mouseover', 'focusin']) document.addEventListener(kind, shade);
for (const kind of ['mouseout', 'focusout']) document.addEventListener(kind, clear);
document.addEventListener('keydown', move);

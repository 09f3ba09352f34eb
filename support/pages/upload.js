// Send the chosen picture with the form's fields, and put the answer into the page.
const find = name => document.querySelector(name);
const form = find('form'), chooser = find('input[type=file]'), drop = find('.drop'), state = find('[role=status]'), again = find('button[name=seed]');
let picture = null, seed = 0, latest = 0;

async function ask() {
  const mine = ++latest, fields = new URLSearchParams(new FormData(form));
  fields.set('name', picture.name);
  fields.set('seed', seed);
  state.textContent = 'Thinking …';
  let reply, text;
  try {
    reply = await fetch('/answer?' + fields, { method: 'POST', body: picture });
    text = await reply.text();
  } catch (problem) {
    text = 'The program does not answer; is it still running?';
  }
  if (mine !== latest) return;  // somebody has asked again since
  state.textContent = reply && reply.ok ? '' : text;
  if (reply && reply.ok) {
    find('section').innerHTML = text;
    find('.controls').hidden = false;
  }
}

function take(files) {
  if (!files.length) return;
  picture = files[0];
  chooser.value = '';  // the same file can be chosen again
  for (const list of document.querySelectorAll('select')) list.selectedIndex = 0;  // what was typed stays
  anew();
}

function anew() {
  seed = 0;
  ask();
}

chooser.addEventListener('change', () => take([...chooser.files]));
for (const list of document.querySelectorAll('select')) list.addEventListener('change', anew);
form.addEventListener('submit', event => { event.preventDefault(); anew(); });
if (again) again.addEventListener('click', () => { seed += 1; ask(); });
for (const kind of ['dragover', 'dragleave', 'drop']) document.addEventListener(kind, event => {
  event.preventDefault();
  drop.classList.toggle('over', kind === 'dragover');
  if (kind === 'drop') take([...event.dataTransfer.files]);
});

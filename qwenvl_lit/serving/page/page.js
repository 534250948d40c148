// The page: questions with images, streamed answers, settings. It keeps the conversation in memory.

import { AnswerView, element } from "./answers.js";
import { imagesOf, isAnswered, messagesOf, rowOf, tagReadOtherwise } from "./conversation.js";
import { imageFrom } from "./images.js";
import { ServerError, chat, modelNames } from "./server.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens"];
const GREEDY = "The same answer again. Answers are greedy unless a temperature is set in Settings.";

let turns = [];
let draft = []; // images of the question that is being written
let edited = null; // {index, text, images} of an edited question and the draft it replaced
let running = null; // the AbortController of the answer that is being streamed
let settings = JSON.parse(localStorage.getItem("settings") ?? "{}");
const views = new WeakMap(); // turn -> {node, show}

// Messages

function say(message, action, run) {
  $("status").replaceChildren(message);
  if (action) $("status").append(" ", button(action, run));
}

function button(textContent, onclick, className = "quiet") {
  return element("button", { type: "button", textContent, onclick, className });
}

// The conversation

function viewOf(turn) {
  if (views.has(turn)) return views.get(turn);
  const images = element("ul", { className: "images" });
  for (const { url, name } of turn.images) {
    images.append(element("li", {}, element("img", { src: url, alt: name, title: name })));
  }
  const question = element("div", { className: "question", role: "group", ariaLabel: "Question" },
    images, element("p", { className: "text", textContent: turn.text }),
    element("div", { className: "actions" }, button("Edit", () => edit(turn))));
  const answer = new AnswerView();
  const note = element("p", { className: "note" });
  const again = button("Regenerate", () => ask(turns.indexOf(turn)), "quiet last-only");
  const raw = button("Markup", () => {
    raw.ariaPressed = String(raw.ariaPressed !== "true");
    show();
  });
  raw.ariaPressed = "false";
  const article = element("div", { className: "answer", role: "group", ariaLabel: "Answer" },
    answer.node, element("div", { className: "actions" }, note, again, raw));
  const node = element("article", { className: "turn" }, question, article);

  function show() {
    const { text, state, error, facts } = turn.answer;
    const images = imagesOf(turns.slice(0, turns.indexOf(turn) + 1));
    const complete = state === "done" && turn.answer.finish !== "length";
    answer.show(turn.answer, images, { complete, raw: raw.ariaPressed === "true" });
    article.dataset.state = state;
    node.classList.toggle("unanswered", state !== "streaming" && !isAnswered(turn));
    article.ariaBusy = String(state === "streaming");
    raw.hidden = !/<(ref|box|quad)>/.test(text);
    again.textContent = state === "failed" ? "Try again" : "Regenerate";
    note.replaceChildren(error ?? facts ?? "");
    note.classList.toggle("error", Boolean(error));
    if (turn.answer.needsKey) note.append(" ", button("Enter a key", openSettings));
  }

  const view = { node, show };
  views.set(turn, view);
  return view;
}

function render() {
  $("log").replaceChildren(...turns.map((turn) => viewOf(turn).node));
  for (const turn of turns) if (turn.answer) viewOf(turn).show();
  $("welcome").hidden = turns.length > 0;
  $("save").disabled = turns.length === 0;
  $("new").disabled = turns.length === 0;
}

function keepAtEnd(change) {
  const page = document.documentElement;
  const isAtEnd = page.scrollTop + innerHeight > page.scrollHeight - 60;
  change();
  if (isAtEnd) page.scrollTop = page.scrollHeight;
}

// Asks the question of turn `index` and drops the turns after it.
async function ask(index) {
  running?.abort();
  turns = turns.slice(0, index + 1);
  const turn = turns[index];
  const before = turn.answer?.state === "done" ? turn.answer.text : null;
  const answer = { text: "", objects: null, state: "streaming" };
  const controller = new AbortController();
  turn.answer = answer;
  setRunning(controller);
  render();
  const { show } = viewOf(turn);
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  say("");
  if (document.activeElement !== $("question")) $("send").focus({ preventScroll: true });
  let frame = 0;
  const redraw = () => { frame ||= requestAnimationFrame(() => { frame = 0; keepAtEnd(show); }); };
  try {
    await stream(answer, controller.signal, redraw);
    if (answer.text === before && !Number(settings.temperature)) say(GREEDY);
  } catch (error) {
    fail(turn, answer, error);
  }
  keepAtEnd(show);
  if (running !== controller) return; // another question or conversation has begun
  setRunning(null);
  const heard = answer.error ?? `Answer: ${answer.text}`;
  $("heard").textContent = heard.replace(/<(box|quad)>.*?<\/\1>|<\/?ref>/g, "");
}

async function stream(answer, signal, redraw) {
  const started = performance.now();
  const request = { model: settings.model, messages: messagesOf(turns, settings.system) };
  for (const name of NUMBERS) if (settings[name]) request[name] = Number(settings[name]);
  let tokens;
  for await (const chunk of chat(request, sessionStorage.getItem("key"), signal)) {
    const choice = chunk.choices?.[0];
    answer.text += choice?.delta?.content ?? "";
    answer.objects = choice?.delta?.objects ?? choice?.message?.objects ?? answer.objects;
    answer.finish = choice?.finish_reason ?? answer.finish;
    tokens = chunk.usage?.completion_tokens ?? tokens;
    redraw();
  }
  if (!answer.finish) throw new ServerError("The connection closed within the answer.");
  answer.state = "done";
  const facts = [`${((performance.now() - started) / 1000).toFixed(1)} s`];
  if (tokens) facts.unshift(`${tokens} tokens`);
  if (answer.finish === "length") facts.unshift("Cut off at the maximum number of tokens");
  if (!answer.text) facts.unshift("The answer is empty");
  answer.facts = facts.join(" · ");
}

function fail(turn, answer, error) {
  if (error.name === "AbortError") {
    answer.state = "stopped";
    answer.facts = "Stopped";
    return;
  }
  answer.state = "failed";
  answer.needsKey = error.status === 401;
  const status = error.status ? `Error ${error.status}: ` : "";
  const until = Date.now() + 1000 * (error.retryAfter ?? 0);
  const timer = setInterval(count, 1000);
  function count() {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    const wait = seconds > 0 ? ` Try again in ${seconds} s.` : "";
    answer.error = `${status}${error.message}${wait}`;
    if (!wait) clearInterval(timer);
    if (turns.includes(turn)) viewOf(turn).show();
  }
  count();
}

function setRunning(controller) {
  running = controller;
  document.body.toggleAttribute("data-running", Boolean(controller));
  $("send").textContent = controller ? "Stop" : "Send";
}

// The question that is being written

function showDraft() {
  $("attached").replaceChildren(...draft.map((image, i) => {
    const remove = button("×", () => {
      draft.splice(i, 1);
      showDraft();
      ($("attached").children[Math.min(i, draft.length - 1)]?.querySelector("button")
        ?? $("files")).focus();
    });
    remove.ariaLabel = `Remove image ${i + 1}, ${image.name}`;
    return element("li", {}, element("img", { src: image.url, alt: image.name }), remove);
  }));
  $("editing").hidden = !edited;
}

async function attach(files) {
  say("");
  for (const file of files) {
    try {
      const image = await imageFrom(file);
      draft.push(image); // that of now: it may have been sent in the meantime
      keepAtEnd(showDraft);
    } catch (error) {
      say(error.message);
    }
  }
  $("question").focus();
}

function setDraft(text, images) {
  $("question").value = text;
  draft = [...images];
  showDraft();
}

function edit(turn) {
  edited ??= { text: $("question").value, images: draft };
  edited.index = turns.indexOf(turn);
  setDraft(turn.text, turn.images);
  $("question").focus();
}

// Brings back the draft that an edited question replaced, if there is one.
function endEdit() {
  const { text, images } = edited ?? { text: "", images: [] };
  edited = null;
  setDraft(text, images);
}

function cancelEdit() {
  endEdit();
  $("question").focus();
}

function submit() {
  const text = $("question").value.trim();
  if (!text && !draft.length) return;
  const index = edited?.index ?? turns.length;
  turns = turns.slice(0, index);
  turns.push({ text, images: draft, answer: null });
  endEdit();
  ask(index);
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (running) running.abort();
  else submit();
};
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) submit();
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if (running) running.abort();
  else if (edited) cancelEdit();
});
$("cancel-edit").onclick = cancelEdit;
$("files").onchange = async ({ target }) => {
  await attach([...target.files]);
  target.value = ""; // the same file can be added again
};
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length || $("settings").open) return;
  event.preventDefault();
  attach([...event.clipboardData.files]);
});
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    const isOver = type === "dragenter" || type === "dragover";
    document.body.classList.toggle("dropping", isOver);
    if (type === "drop") attach([...event.dataTransfer.files]);
  });
}
$("example").onclick = async () => {
  const blob = await (await fetch("example.png")).blob();
  await attach([new File([blob], "example.png", { type: "image/png" })]);
  $("question").value = "Describe with boxes.";
};

// The header

$("new").onclick = () => {
  const before = turns;
  running?.abort();
  setRunning(null);
  turns = [];
  if (edited) endEdit();
  render();
  say("The conversation is cleared.", "Undo", () => {
    turns = [...before, ...turns];
    render();
    say("");
  });
  $("question").focus();
};

$("save").onclick = () => {
  const time = new Date().toISOString().slice(0, 19).replace(/[-:]/g, "");
  const row = rowOf(turns, settings.system, `chat-${time}`);
  const href = URL.createObjectURL(new Blob([row], { type: "application/jsonl" }));
  element("a", { href, download: `chat-${time}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
  const tag = tagReadOtherwise(turns);
  const warning = tag ? ` Its text has ${tag}, which data=jsonl reads as a tag, not as text.` : "";
  say(`Saved as chat-${time}.jsonl, a row for data=jsonl.${warning}`);
};

function showTheme() {
  const chosen = localStorage.getItem("theme");
  const isDark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.style.colorScheme = chosen ?? "";
  $("theme").textContent = isDark ? "Light" : "Dark";
}
$("theme").onclick = () => {
  localStorage.setItem("theme", $("theme").textContent.toLowerCase());
  showTheme();
};
matchMedia("(prefers-color-scheme: dark)").onchange = showTheme;

// Settings

async function loadModels() {
  let names = [];
  try {
    names = await modelNames(sessionStorage.getItem("key"));
  } catch (error) {
    const isWrong = Boolean(sessionStorage.getItem("key"));
    const message = isWrong ? "This key is wrong." : "The server asks for a key.";
    if (error.status === 401) say(message, "Enter a key", openSettings);
    else say(error.message);
  }
  if (!names.includes(settings.model)) settings.model = names[0];
  const options = names.map((name) => element("option", { value: name, textContent: name }));
  $("settings-form").model.replaceChildren(...options);
  $("model-name").textContent = settings.model ?? "";
}

function openSettings() {
  const form = $("settings-form");
  for (const name of ["model", "system", ...NUMBERS]) form[name].value = settings[name] ?? "";
  form.key.value = sessionStorage.getItem("key") ?? "";
  $("settings").showModal();
}

$("open-settings").onclick = openSettings;
$("close-settings").onclick = () => $("settings").close();
$("settings-form").onsubmit = async ({ target }) => {
  settings = Object.fromEntries(new FormData(target));
  sessionStorage.setItem("key", settings.key.trim());
  delete settings.key;
  localStorage.setItem("settings", JSON.stringify(settings));
  say("");
  await loadModels();
  const last = turns.length - 1;
  if (settings.model && turns[last]?.answer?.needsKey) ask(last);
};

showTheme();
render();
loadModels();

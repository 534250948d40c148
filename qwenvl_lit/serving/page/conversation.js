// A conversation is a list of turns {text, images, answer}. An image is {url, name, width, height}
// with a data URL; an answer is {text, objects, state}, whose state is "streaming", "done",
// "stopped" or "failed".

export function isAnswered({ answer }) {
  return Boolean(answer) && (answer.state === "done" || answer.text !== "");
}

// Returns the turns that count: a question without an answer is left out unless it is the last.
export function counted(turns) {
  return turns.filter((turn, i) => isAnswered(turn) || i === turns.length - 1);
}

export function imagesOf(turns) {
  return counted(turns).flatMap((turn) => turn.images);
}

// Returns the messages of OpenAI's chat API.
export function messagesOf(turns, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of counted(turns)) {
    const content = turn.images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    if (turn.text) content.push({ type: "text", text: turn.text });
    messages.push({ role: "user", content });
    if (isAnswered(turn)) messages.push({ role: "assistant", content: turn.answer.text });
  }
  return messages;
}

// Returns the conversation as one line that `data=jsonl` reads.
export function rowOf(turns, system, id) {
  return JSON.stringify({ id, messages: messagesOf(turns, system) }) + "\n";
}

// Returns a tag that the conversation has as plain text and a row has for an image or an object.
export function tagReadOtherwise(turns) {
  const texts = counted(turns).flatMap((turn) => [turn.text, turn.answer?.text ?? ""]);
  return texts.join("\n").match(/<img>|<image>|<ref-object>|<bbox>/)?.[0];
}

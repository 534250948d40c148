// Talks to the server: OpenAI's API, relative to the address of this page.

export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

async function send(path, key, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? (response.statusText || "no message");
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  throw new ServerError(message, response.status, retryAfter);
}

export async function modelNames(key) {
  const { data } = await (await send("v1/models", key)).json();
  return data.map((model) => model.id);
}

// Yields the chunks of a streamed answer.
export async function* chat(request, key, signal) {
  const body = JSON.stringify({
    ...request, stream: true, stream_options: { include_usage: true },
  });
  const response = await send("v1/chat/completions", key, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection broke within the answer.");
    }
    if (read.done) return;
    buffer += read.value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, Number(chunk.error.code) || 0);
      yield chunk;
    }
  }
}

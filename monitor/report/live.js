const EVERY_MS = 1000;

/**
 * Makes `from` like `to`, and keeps what can be kept: scroll, focus, the slider, drawn figures. Attributes that `to`
 * lacks stay, too: the reader has opened definitions, and the slider says its step.
 */
function morph(from, to) {
  if (from.nodeType !== Node.ELEMENT_NODE) {
    if (from.data !== to.data) from.data = to.data;
    return;
  }
  for (const { name, value } of [...to.attributes]) {
    // Plotly marks its elements by classes of its own.
    if (name !== "class" && from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
  if (!from.hasAttribute("data-keep")) morphChildren(from, to);
}

/** Children with an id are found by it; others by their place. */
function morphChildren(from, to) {
  const named = new Map([...from.children].filter(({ id }) => id).map((child) => [child.id, child]));
  let at = from.firstChild;
  for (const wanted of [...to.childNodes]) {
    const here = at && !at.id && !wanted.id && at.nodeName === wanted.nodeName ? at : null;
    const match = (wanted.id && named.get(wanted.id)) || here;
    if (!match) from.insertBefore(wanted, at);
    else {
      if (match === at) at = at.nextSibling;
      else from.insertBefore(match, at);
      morph(match, wanted);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

/** Puts newer content in place. A slider at its end stays there; elsewhere it stays at its step. */
function update({ version, title, body, data }) {
  const content = document.getElementById("content");
  const slider = document.getElementById("step");
  const follows = !slider || slider.value === slider.max;
  const next = content.cloneNode(false);
  next.innerHTML = body;
  next.dataset.version = version;
  morph(content, next);
  document.title = `repflow report: ${title}`;
  adopt(data);
  const moved = document.getElementById("step");
  if (moved) moved.value = follows ? moved.max : nearest(JSON.parse(moved.dataset.steps), chosen);
  readSlider();
  outdate();
}

/** Asks the server for newer content, for as long as the page is open. */
async function follow() {
  const content = document.getElementById("content");
  const say = (id, text) => {
    const place = document.getElementById(id);
    if (place.textContent !== text) place.textContent = text;
  };
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
    if (document.hidden || document.querySelector("input:active")) continue;
    try {
      const headers = { "If-None-Match": content.dataset.version };
      const response = await fetch("content", { headers, cache: "no-store" });
      if (response.status === 200) {
        update(await response.json());
        say("updated", `last change ${new Date().toLocaleTimeString("en", { hour12: false })}`);
      }
      say("live", response.status < 400 ? "following" : "the server could not read the runs; trying again");
    } catch {
      say("live", "the server does not answer; trying again");
    }
  }
}

// The strip of blocks below the video: a picture per block, coloured by its prompt.

const KEPT = 160; // blocks
const COLORS = ["#8b7cf6", "#f0883e", "#2bb3a3", "#e25c9b", "#4a90e8", "#c9a227", "#7aa33c", "#d9534f"];
const WORLD = { red: "#e1282d", green: "#28b946", blue: "#2d55eb", yellow: "#f5d72d", purple: "#a032cd", orange: "#fa8c1e" };
const SHAPES = {
  circle: '<circle cx="9" cy="9" r="7"/>',
  square: '<rect x="2.5" y="2.5" width="13" height="13" rx="1.5"/>',
  triangle: '<path d="M9 2.2 16.4 15H1.6z"/>',
};

/** Return the colour of the n-th prompt of a video. */
export function promptColor(index) { return COLORS[index % COLORS.length]; }

/** Return a small picture of an example: the shape that its words name, or a dot. */
export function exampleIcon(text) {
  const [, color, shape] = text.match(/\b(red|green|blue|yellow|purple|orange) (circle|square|triangle)\b/) ?? [];
  const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  icon.setAttribute("viewBox", "0 0 18 18");
  icon.setAttribute("aria-hidden", "true");
  icon.setAttribute("fill", WORLD[color] ?? "currentColor");
  icon.innerHTML = SHAPES[shape] ?? '<circle cx="9" cy="9" r="2.5"/>';
  return icon;
}

export class Film {
  constructor(list) {
    this.list = list;
    this.aspect = 1;
    this.reset();
    list.parentElement.addEventListener("scroll", () => this.pinLabels(), { passive: true });
  }

  reset() {
    this.items = new Map();
    this.now = -1;
    this.list.replaceChildren();
  }

  /** Append a block: {prompt, isSwitch, color}. */
  add(number, { prompt, isSwitch, color }) {
    const item = document.createElement("li"), canvas = document.createElement("canvas");
    canvas.height = 112;
    canvas.width = Math.round(112 * this.aspect);
    canvas.style.width = `${Math.round(56 * this.aspect)}px`;
    item.title = `block ${number}: ${prompt}`;
    item.style.setProperty("--prompt", color);
    item.append(canvas);
    if (isSwitch) item.append(Object.assign(document.createElement("b"), { textContent: prompt }));
    this.items.set(number, item);
    const atEnd = this.isAtEnd();
    this.list.append(item);
    if (this.items.size > KEPT) {
      const [oldest, first] = this.items.entries().next().value;
      first.remove();
      this.items.delete(oldest);
      this.labelFirst(first);
    }
    if (atEnd) this.list.parentElement.scrollLeft = this.list.parentElement.scrollWidth;
    this.pinLabels();
  }

  /** Keep the prompt of the leftmost visible block in view. */
  pinLabels() {
    const start = this.list.parentElement.scrollLeft, labels = [...this.list.querySelectorAll("b")];
    labels.forEach((label, index) => {
      const left = label.parentElement.offsetLeft, end = labels[index + 1]?.parentElement.offsetLeft ?? Infinity;
      const shift = Math.max(0, Math.min(start - left + 12, end - left - label.offsetWidth));
      label.style.transform = shift ? `translateX(${shift}px)` : "";
    });
  }

  /** Draw the picture of a block. */
  picture(number, bitmap) {
    const canvas = this.items.get(number)?.firstElementChild;
    canvas?.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  }

  /** Mark the block that is on the screen. */
  mark(number) {
    if (number === this.now) return;
    this.items.get(this.now)?.classList.remove("now");
    this.items.get(number)?.classList.add("now");
    this.now = number;
  }

  isAtEnd() {
    const box = this.list.parentElement;
    return box.scrollLeft + box.clientWidth > box.scrollWidth - 80;
  }

  /** Keep the label of a prompt when its first block leaves the strip. */
  labelFirst(removed) {
    const first = this.list.firstElementChild, label = removed.querySelector("b");
    if (label && first && !first.querySelector("b")) first.append(label);
  }
}

// What an answer was made from: the prompt's blocks, each marked by how many heads selected it.

const span = (text, className) => {
  const result = document.createElement("span");
  result.className = className;
  result.textContent = text;
  return result;
};

export class Reads {
  // blocks: texts of the prompt's blocks of `size` tokens each.
  constructor(turn, blocks, size) {
    this.turn = turn;
    this.size = size;
    this.tokens = []; // of each token the stretches [start, end, share] that it was made from
    this.waiting = [];
    this.panel = document.createElement("details");
    this.panel.className = "reads";
    this.panel.open = true;
    this.title = document.createElement("summary");
    this.marks = blocks.map((text) => span(text, "block"));
    this.panel.append(this.title, ...this.marks);
    turn.after(this.panel);
    turn.addEventListener("mouseleave", () => this.show(this.tokens, "the answer"));
    turn.addEventListener("focusout", () => this.show(this.tokens, "the answer"));
  }

  // A piece of the answer and its tokens' stretches; tokens may come before their text.
  add(text, tokens) {
    this.waiting.push(...tokens);
    this.tokens.push(...tokens);
    this.show(this.tokens, "the answer");
    if (!text) return;
    const [own, piece] = [this.waiting, span(text, "token")];
    this.waiting = [];
    piece.tabIndex = 0;
    for (const kind of ["mouseenter", "focus"]) {
      piece.addEventListener(kind, () => this.show(own, `\u201c${text}\u201d`));
    }
    this.turn.append(piece);
  }

  show(tokens, what) {
    const shares = new Float64Array(this.marks.length);
    for (const [start, end, share] of tokens.flat()) {
      const last = Math.min(this.marks.length, Math.ceil(end / this.size));
      for (let block = Math.floor(start / this.size); block < last; block += 1) {
        shares[block] += share / tokens.length;
      }
    }
    this.title.textContent = `Blocks of the prompt that ${what} was made from`;
    this.marks.forEach((mark, block) => {
      mark.style.setProperty("--share", shares[block].toFixed(3));
      mark.title = `${Math.round(100 * shares[block])} % of heads`;
      mark.classList.toggle("read", shares[block] > 0);
    });
  }
}

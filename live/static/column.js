// What the grid has drawn of one block.

export class Column {
  constructor(steps) {
    this.tiles = new Array(steps);
    this.writes = new Map();
    this.frame = null;
    this.done = this.changed = 0;
    this.key = "";
  }

  /** State that the picture of the column changes now. */
  change(now) {
    this.changed = now;
    this.key = "";
  }

  close() {
    for (const tile of this.tiles) tile?.bitmap?.close();
    this.frame?.close();
  }
}

// Draws the schedule: a column per block, a row per denoising step, and the finished video in the last row.
// A tile appears when its op has run. Its colour is the noise level, its picture the x0 estimate.

import { Board, FADE } from "./board.js";
import { glow, INK, noiseColor, rgba } from "./palette.js";

const SETTLED = 1600; // ms after which a tile no longer changes
const FONT = "ui-sans-serif, system-ui, sans-serif";

export class Grid extends Board {
  // ---- Drawing ----

  /** Draw the grid. Called once per refresh while it is visible. */
  draw(now) {
    if (!this.width) this.resize();
    if (!this.width) return;
    const target = Math.max(0, this.newest + 1.75 - this.visible), elapsed = Math.min(200, now - (this.drawn ?? now));
    this.drawn = now;
    this.camera += (target - this.camera) * (this.still ? 1 : 1 - Math.exp(-elapsed / 240));
    const { context: c, ratio } = this, ink = INK[this.theme];
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.fillStyle = ink.back;
    c.fillRect(0, 0, this.width, this.height);
    c.save();
    c.beginPath();
    c.rect(this.gutter, 0, this.width - this.gutter, this.height);
    c.clip();
    this.drawBands();
    const first = Math.max(0, Math.floor(this.camera) - 1), last = Math.ceil(this.camera + this.visible);
    for (let block = first; block <= last; block++) if (!this.isSettled(block, now)) this.drawHalos(block, now);
    for (let block = first; block <= last; block++) {
      if (this.isSettled(block, now)) this.drawCopy(block, now);
      else this.drawColumn(block, now);
    }
    this.drawPlayhead(this.playing.block, this.steps);
    this.drawLinks(now);
    this.drawHeadings(first, last);
    c.restore();
    this.drawLabels();
  }

  drawBands() {
    const c = this.context, alpha = this.theme === "dark" ? 0.075 : 0.07;
    for (let row = 0; row <= this.steps; row++) {
      const color = this.rowColor(row), y = this.y(row) - this.gap / 2;
      const band = c.createLinearGradient(this.gutter, 0, this.width, 0);
      band.addColorStop(0, rgba(color, alpha * 1.6));
      band.addColorStop(1, rgba(color, alpha * 0.4));
      c.fillStyle = band;
      c.fillRect(this.gutter, y, this.width, this.pitchY);
    }
  }

  rowColor(row) { return noiseColor(row === this.steps ? 0 : this.sigmas[row], this.theme); }

  isSettled(block, now) {
    const column = this.columns.get(block);
    return column?.frame && now - column.changed > SETTLED;
  }

  /** Draw a column that no longer changes. It is drawn once and copied from then on. */
  drawCopy(block, now) {
    const column = this.columns.get(block);
    const margin = 0.45 * this.tileHeight, left = this.x(block) - margin, key = `${this.theme} ${this.width} ${this.height}`;
    if (column.key !== key) {
      const copy = new OffscreenCanvas((this.tileWidth + 2 * margin) * this.ratio, this.height * this.ratio);
      const context = this.context;
      this.context = copy.getContext("2d");
      this.context.setTransform(this.ratio, 0, 0, this.ratio, -left * this.ratio, 0);
      this.drawHalos(block, now);
      this.drawColumn(block, now);
      this.context = context;
      Object.assign(column, { key, copy });
    }
    this.context.drawImage(column.copy, left, 0, column.copy.width / this.ratio, this.height);
  }

  drawColumn(block, now) {
    const column = this.columns.get(block);
    for (let row = 0; row < this.steps; row++) {
      const tile = column?.tiles[row];
      if (tile) this.drawTile(block, row, tile.bitmap, now - tile.time, this.rowColor(row));
      else this.drawEmpty(block, row);
      if (tile && column.tiles[row + 1]) this.drawStem(block, row);
    }
    if (column?.done) {
      if (column.tiles[this.steps - 1]) this.drawStem(block, this.steps - 1);
      this.drawTile(block, this.steps, column.frame ?? column.tiles[this.steps - 1]?.bitmap, now - column.done, this.rowColor(this.steps));
    } else this.drawEmpty(block, this.steps);
    for (const [level, time] of column?.writes ?? []) this.drawWrite(block, level, now - time);
  }

  shape(block, row, grow = 0) {
    const c = this.context, radius = Math.min(14, this.tileHeight * 0.17);
    c.beginPath();
    c.roundRect(this.x(block) - grow, this.y(row) - grow, this.tileWidth + 2 * grow, this.tileHeight + 2 * grow, radius + grow);
  }

  drawEmpty(block, row) {
    const c = this.context;
    this.shape(block, row, -1);
    c.setLineDash([2, 5]);
    c.lineWidth = 1;
    c.strokeStyle = rgba(this.rowColor(row), this.theme === "dark" ? 0.3 : 0.42);
    c.stroke();
    c.setLineDash([]);
  }

  /** Draw the light around the tiles of a column, below all tiles. */
  drawHalos(block, now) {
    const column = this.columns.get(block), c = this.context, dark = this.theme === "dark";
    if (!column) return;
    c.globalCompositeOperation = dark ? "lighter" : "multiply";
    for (let row = 0; row <= this.steps; row++) {
      const time = row === this.steps ? column.done : column.tiles[row]?.time;
      if (!time) continue;
      const fresh = this.still ? 0 : Math.exp((time - now) / 420), spread = this.tileHeight * (0.34 + 0.5 * fresh);
      c.globalAlpha = dark ? Math.min(0.62, 0.13 + 0.5 * fresh) : Math.min(0.5, 0.06 + 0.4 * fresh);
      const size = [this.tileWidth + 2 * spread, this.tileHeight + 2 * spread];
      c.drawImage(glow(this.rowColor(row)), this.x(block) - spread, this.y(row) - spread, ...size);
    }
    c.globalAlpha = 1;
    c.globalCompositeOperation = "source-over";
  }

  drawTile(block, row, bitmap, age, color) {
    const c = this.context, fresh = this.still ? 0 : Math.exp(-age / 420), ink = INK[this.theme];
    const grow = 3.5 * fresh;
    const x = this.x(block), y = this.y(row), w = this.tileWidth, h = this.tileHeight;
    c.save();
    this.shape(block, row, grow);
    c.fillStyle = ink.tile;
    c.fill();
    c.clip();
    if (bitmap) this.drawCovering(bitmap, x - grow, y - grow, w + 2 * grow, h + 2 * grow);
    if (row < this.steps) { // tinted from below, stronger where more noise remains
      const tint = c.createLinearGradient(0, y, 0, y + h);
      tint.addColorStop(0, rgba(color, 0));
      tint.addColorStop(1, rgba(color, bitmap ? 0.42 : 0.6));
      c.fillStyle = tint;
      c.fillRect(x - grow, y - grow, w + 2 * grow, h + 2 * grow);
    }
    if (fresh > 0.02) {
      c.fillStyle = rgba(color, 0.5 * fresh ** 2);
      c.fillRect(x - grow, y - grow, w + 2 * grow, h + 2 * grow);
    }
    c.restore();
    this.shape(block, row, grow - 0.75);
    c.lineWidth = 2.25 + 1.5 * fresh;
    c.strokeStyle = rgba(color, 1);
    c.stroke();
  }

  drawCovering(bitmap, x, y, w, h) {
    const scale = Math.max(w / bitmap.width, h / bitmap.height);
    const sw = w / scale, sh = h / scale;
    this.context.imageSmoothingQuality = "high";
    this.context.drawImage(bitmap, (bitmap.width - sw) / 2, (bitmap.height - sh) / 2, sw, sh, x, y, w, h);
  }

  drawPlayhead(block, row) {
    if (!this.columns.get(block)?.done) return;
    const c = this.context, ink = INK[this.theme];
    this.shape(block, row, 2.5);
    c.lineWidth = 2;
    c.strokeStyle = ink.text;
    c.stroke();
    const x = this.x(block), y = this.y(row) + this.tileHeight - 7;
    c.lineCap = "round";
    c.lineWidth = 3;
    c.strokeStyle = "rgba(0,0,0,.35)";
    this.line(x + 7, y, x + this.tileWidth - 7, y);
    c.strokeStyle = "#fff";
    this.line(x + 7, y, x + 7 + (this.tileWidth - 14) * this.playing.share, y);
    c.lineCap = "butt";
  }

  drawStem(block, row) {
    const c = this.context, x = this.x(block) + this.tileWidth / 2;
    const from = this.y(row) + this.tileHeight, to = this.y(row + 1);
    const fade = c.createLinearGradient(0, from, 0, to);
    fade.addColorStop(0, rgba(this.rowColor(row), 1));
    fade.addColorStop(1, rgba(this.rowColor(row + 1), 1));
    c.strokeStyle = fade;
    c.lineWidth = 2.5;
    this.line(x, from, x, to);
  }

  /** Draw the context of a block at a noise level: a dot on the right edge of the tile that made it. */
  drawWrite(block, level, age) {
    const [x, y] = this.port(block, level), c = this.context, fresh = this.still ? 0 : Math.exp(-age / 420);
    c.beginPath();
    c.arc(x, y, 3.2 + 3 * fresh, 0, 7);
    c.fillStyle = rgba(noiseColor(this.sigmas[level], this.theme), 1);
    c.fill();
    c.lineWidth = 1.5;
    c.strokeStyle = INK[this.theme].back;
    c.stroke();
  }

  port(block, level) {
    const row = level === 0 ? 0 : level - 1; // step `level - 1` makes the block at noise index `level`
    return [this.x(block) + this.tileWidth, this.y(row) + this.tileHeight * (level === 0 ? 0.25 : 0.5)];
  }

  drawLinks(now) {
    const c = this.context;
    c.lineCap = "round";
    for (const { from, to, time, back } of this.links) {
      const life = 1 - (now - time) / (this.schedule === "block_first" ? FADE / 2 : FADE); // one block draws more lines
      if (life <= 0) continue;
      const [x0, y0] = this.port(...from), x1 = this.x(to[0]), y1 = this.y(to[1]) + this.tileHeight / 2;
      const lift = y0 === y1 ? -0.3 * (back - 1) * this.tileHeight : 0, bend = (x1 - x0) * 0.3;
      c.beginPath();
      c.moveTo(x0, y0);
      c.bezierCurveTo(x0 + bend, y0 + lift, x1 - bend, y1 + lift, x1, y1);
      c.globalAlpha = Math.min(1, 1.7 * life) / back ** 0.3;
      c.lineWidth = 2.6 + 2 * life; // a rim, so that lines stand out from bright and dark pictures
      c.strokeStyle = INK[this.theme].back;
      c.stroke();
      c.lineWidth = 1.2 + 2 * life;
      c.strokeStyle = rgba(noiseColor(this.sigmas[from[1]], this.theme), 1);
      c.stroke();
    }
    c.globalAlpha = 1;
    c.lineCap = "butt";
  }

  /** Draw the block numbers, and the prompts above the blocks that follow them. */
  drawHeadings(first, last) {
    const c = this.context, ink = INK[this.theme], bottom = this.y(this.steps) + this.tileHeight;
    const every = this.pitchX < 34 ? 4 : 1;
    c.textAlign = "center";
    c.fillStyle = ink.muted;
    c.font = `500 11px ${FONT}`;
    for (let block = first; block <= last; block++) {
      if (block % every === 0) c.fillText(String(block), this.x(block) + this.tileWidth / 2, bottom + 17);
    }
    c.textAlign = "left";
    c.font = `560 12px ${FONT}`;
    for (let block = first; block <= last; block++) {
      const column = this.columns.get(block);
      if (!column?.color) continue;
      let end = block;
      while (end < last && this.columns.get(end + 1)?.color && !this.columns.get(end + 1).isSwitch) end++;
      const x0 = Math.max(this.x(block), this.gutter + 2), x1 = this.x(end) + this.tileWidth;
      const open = !this.columns.get(end + 1)?.isSwitch;
      c.fillStyle = column.color;
      c.beginPath();
      c.roundRect(x0, this.top - 9, x1 - x0, 3, 2);
      c.fill();
      c.fillStyle = ink.text;
      c.fillText(this.shorten(column.prompt, (open ? this.width : x1) - x0 - 8), x0, this.top - 16);
      block = end;
    }
  }

  shorten(text, room) {
    const c = this.context;
    if (c.measureText(text).width <= room) return text;
    let length = text.length;
    while (length > 0 && c.measureText(text.slice(0, length) + "…").width > room) length = Math.floor(length * 0.9);
    return length > 3 ? text.slice(0, length).trimEnd() + "…" : "";
  }

  drawLabels() {
    const c = this.context, ink = INK[this.theme], narrow = this.gutter < 80;
    c.textAlign = "left";
    for (let row = 0; row <= this.steps; row++) {
      const y = this.y(row) + this.tileHeight / 2, x = narrow ? 10 : 18;
      c.fillStyle = rgba(this.rowColor(row), 1);
      c.beginPath();
      c.roundRect(x - 7, this.y(row), 3.5, this.tileHeight, 2);
      c.fill();
      c.fillStyle = ink.text;
      c.font = `600 ${narrow ? 11 : 13}px ${FONT}`;
      const last = row === this.steps;
      c.fillText(last ? "video" : narrow ? `${row + 1}` : `step ${row + 1}`, x + 3, y - 1);
      c.fillStyle = ink.muted;
      c.font = `450 ${narrow ? 10 : 12}px ${FONT}`;
      c.fillText(last ? (narrow ? "" : "decoded") : `σ ${this.sigmas[row].toFixed(2)}`, x + 3, y + 14);
    }
    c.fillStyle = ink.muted;
    c.fillText("block", narrow ? 13 : 21, this.y(this.steps) + this.tileHeight + 17);
  }

  line(x0, y0, x1, y1) {
    const c = this.context;
    c.beginPath();
    c.moveTo(x0, y0);
    c.lineTo(x1, y1);
    c.stroke();
  }
}

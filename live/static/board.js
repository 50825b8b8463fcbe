// What has run so far, block by block and step by step, and where each tile lies on the canvas.

import { Column } from "./column.js";

const KEPT = 96; // columns
const LINKS = 4; // context blocks that are drawn per op
export const FADE = 900; // ms for which the lines of an op are drawn

export class Board {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.theme = "dark";
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.setModel([1, 0], 12, 16, 1, "output");
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  /** `sigmas`: noise levels 0..S; `aspect`: width of a frame divided by its height. */
  setModel(sigmas, blockFrames, fps, aspect, contextRule) {
    Object.assign(this, { sigmas, blockFrames, fps, aspect, contextRule, steps: sigmas.length - 1 });
    this.reset("timestep_first");
  }

  reset(schedule) {
    for (const column of this.columns?.values() ?? []) column.close();
    this.schedule = schedule;
    this.columns = new Map();
    this.newest = 0;
    this.camera = 0;
    this.playing = { block: -1, share: 0 };
    this.links = [];
  }

  // ---- Events ----

  column(block) {
    let column = this.columns.get(block);
    if (!column) {
      column = new Column(this.steps);
      this.columns.set(block, column);
      this.newest = Math.max(this.newest, block);
      this.columns.get(block - KEPT)?.close();
      this.columns.delete(block - KEPT);
    }
    return column;
  }

  /** Show an op of the schedule. */
  op({ kind, block, step, sigma }, now) {
    const column = this.column(block);
    column.change(now);
    if (kind === "denoise") {
      column.tiles[step] = { ...column.tiles[step], sigma, time: now };
      this.addLinks(block, step, now);
    } else if (kind === "write") {
      column.writes.set(step, now);
    }
  }

  /** Show the x0 estimate of a block. */
  thumbnail(block, step, bitmap) {
    const column = this.columns.get(block);
    if (!column?.tiles[step]) return bitmap.close();
    column.tiles[step].bitmap?.close();
    column.tiles[step].bitmap = bitmap;
    column.change(performance.now());
  }

  /** State that the frames of a block are there, with the colour of its prompt. */
  finished(block, color, prompt, isSwitch, now) {
    const column = this.column(block);
    column.change(now);
    Object.assign(column, { color, prompt, isSwitch, done: now });
  }

  /** Show a frame of the video in the last row. */
  frame(block, bitmap) {
    const column = this.columns.get(block);
    if (!column) return bitmap.close();
    column.frame?.close();
    column.frame = bitmap;
    column.change(performance.now());
  }

  addLinks(block, step, now) {
    for (let back = 1; back <= LINKS; back++) {
      const source = this.columns.get(block - back);
      const level = this.contextLevel(step);
      if (source?.writes.has(level)) this.links.push({ from: [block - back, level], to: [block, step], time: now, back });
    }
    this.links = this.links.filter((link) => now - link.time < FADE);
  }

  /** Return the noise index of the context that a step reads. */
  contextLevel(step) {
    if (this.schedule === "block_first" || this.contextRule === "clean") return this.steps;
    return this.contextRule === "input" ? step : step + 1;
  }

  // ---- Geometry ----

  resize() {
    const ratio = Math.min(2, devicePixelRatio || 1);
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.ratio = ratio;
    const narrow = this.width < 560;
    this.gutter = narrow ? 52 : 92;
    const rows = this.steps + 1, top = narrow ? 30 : 38, bottom = narrow ? 30 : 38;
    const pitchY = (this.height - top - bottom) / (rows + 0.22);
    this.gap = Math.max(3, pitchY * 0.13);
    this.tileHeight = pitchY - this.gap;
    this.tileWidth = Math.min(this.tileHeight * this.aspect, this.width / 4);
    this.pitchX = this.tileWidth + this.gap;
    this.pitchY = pitchY;
    this.top = top;
    this.visible = (this.width - this.gutter) / this.pitchX;
  }

  x(block) { return this.gutter + (block - this.camera) * this.pitchX + this.gap / 2; }
  y(row) { return this.top + row * this.pitchY + this.gap / 2 + (row === this.steps ? 0.22 * this.pitchY : 0); }
}

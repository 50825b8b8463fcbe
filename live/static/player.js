// Plays frames at the video's rate and measures what reaches the screen.

const MAX_WAITING = 240; // frames; older ones are dropped

export class Player {
  /** `onShow(frame)` is called for each frame that is drawn. */
  constructor(canvas, light, onShow) {
    this.canvas = canvas;
    this.light = light.getContext("2d"); // a few pixels, stretched behind the video
    this.context = canvas.getContext("2d");
    this.onShow = onShow;
    this.fps = 16;
    this.blockFrames = 12;
    this.paused = false;
    this.reset();
  }

  /** Set the size of the video in pixels; small videos are enlarged smoothly. */
  setSize(width, height) {
    const scale = Math.max(1, Math.round(768 / Math.max(width, height)));
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.context.imageSmoothingQuality = "high";
  }

  reset() {
    for (const frame of this.frames ?? []) frame.bitmap?.close();
    this.frames = [];
    this.due = 0;
    this.shownTimes = [];
    this.epoch = (this.epoch ?? 0) + 1;
  }

  /** Queue a JPEG frame. Frames are decoded in parallel and shown in the order in which they came. */
  add(jpeg, block, number, index) {
    const frame = { block, number, index, bitmap: null };
    const epoch = this.epoch;
    this.frames.push(frame);
    createImageBitmap(new Blob([jpeg], { type: "image/jpeg" })).then(
      (bitmap) => { if (epoch === this.epoch && this.frames.includes(frame)) frame.bitmap = bitmap; else bitmap.close(); },
      () => { this.frames = this.frames.filter((other) => other !== frame); },
    );
    if (this.frames.length > MAX_WAITING) this.skip(1);
  }

  /** Show the frame that is due; skip frames that are late. Called once per refresh of the screen. */
  tick(now) {
    if (this.paused) return;
    if (this.frames.length > 4 * this.blockFrames) this.skip(this.frames.length - 2 * this.blockFrames);
    // A long queue is played a little faster, so that prompts reach the screen soon.
    const interval = (1000 / this.fps) * (this.frames.length > 2 * this.blockFrames ? 0.9 : 1);
    while (now >= this.due + interval && this.frames[1]?.bitmap) {
      this.skip(1);
      this.due += interval;
    }
    if (now < this.due || !this.frames[0]?.bitmap) return;
    const frame = this.frames.shift(), { width, height } = this.canvas;
    this.context.drawImage(frame.bitmap, 0, 0, width, height);
    if (frame.index % 3 === 0) this.light.drawImage(frame.bitmap, 0, 0, 3, 3);
    this.due = Math.max(this.due + interval, now - 4 * interval);
    this.shownTimes.push(now);
    while (this.shownTimes[0] < now - 2000) this.shownTimes.shift();
    this.onShow(frame);
    frame.bitmap.close();
  }

  skip(count) {
    for (const frame of this.frames.splice(0, count)) frame.bitmap?.close();
  }

  /** Frames per second on the screen over the last two seconds. */
  rate(now) {
    const times = this.shownTimes;
    if (times.length < 2 || now - times.at(-1) > 1500) return 0;
    return ((times.length - 1) * 1000) / (times.at(-1) - times[0]);
  }
}

//! Threads decode and resize ahead; one writes, in the order of the samples, so that the shards are the same for any
//! number of threads. Each shard is written aside, and has its name once it is on the disk.

use std::collections::HashMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use pixmim::data::Image;
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::data::shard::ShardWriter;
use pixmim::data::source::{BadImage, Source};
use pixmim::train::config::Interpolation;
use pixmim::{Error, Result};

use crate::plan::{BAD_IMAGES, Plan};
use crate::program::{quoted, say};
use crate::progress::Progress;

/// Makes the shards that are missing; stops between two photos when asked to.
pub(crate) fn pack(plan: &Plan, stop: &AtomicBool) -> Result<()> {
    let samples: Vec<usize> =
        plan.missing.iter().flat_map(|number| plan.samples(*number)).collect();
    let finished = plan.set.shards as usize - plan.missing.len();
    say(&format!("pixmim {} | pack_dataset", pixmim::VERSION));
    say(&format!("data      {} images: {}", plan.source.len(), plan.source.path().display()));
    say(&format!(
        "out       {}: {finished} of {} shards are there already",
        plan.out.display(),
        plan.set.shards
    ));
    let mut progress = Progress::new(samples.len());
    let mut bad = plan.bad.clone();
    let result = write(plan, &samples, stop, &mut bad, &mut progress);
    progress.clear();
    let listed = list(plan, &mut bad);
    let missing = plan.missing.len() - result?;
    listed?;
    let (images, speed) = (plan.source.len() - bad.len(), progress.images_per_s());
    if missing > 0 {
        say(&format!(
            "stopped shards={} of={} images_per_s={speed:.0}; the same command goes on",
            plan.set.shards as usize - missing,
            plan.set.shards
        ));
        return Ok(());
    }
    let mut how = String::new();
    if plan.set.side > 0 {
        how = format!(" --set model.image_size={}", plan.set.side);
        if plan.set.interpolation == Interpolation::Bilinear {
            how.push_str(" --set method.interpolation=bilinear");
        }
    }
    say(&format!(
        "done images={images} bad={} shards={} images_per_s={speed:.0} train with: pretrain_vit --data {}{how}",
        bad.len(),
        plan.set.shards,
        quoted(&plan.out.to_string_lossy())
    ));
    Ok(())
}

/// Writes shards; tells how many were finished.
fn write(
    plan: &Plan,
    samples: &[usize],
    stop: &AtomicBool,
    bad: &mut Vec<BadImage>,
    progress: &mut Progress,
) -> Result<usize> {
    let queue = Queue::new(samples, plan.threads);
    thread::scope(|scope| {
        let closer = Closer(&queue);
        for _ in 0..plan.threads {
            scope.spawn(|| queue.work(|sample| make(&plan.source, sample, plan)));
        }
        let mut finished = 0;
        // The disk takes one shard while the next is made.
        let mut finishing: Option<ScopedJoinHandle<'_, Result<()>>> = None;
        let join = |handle: ScopedJoinHandle<'_, Result<()>>| {
            handle.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        for number in &plan.missing {
            let range = plan.samples(*number);
            let path = plan.path(*number);
            let mut writer =
                ShardWriter::create(&path, plan.set.clone(), *number, range.start as u64)?;
            let mut stopped = false;
            for sample in range {
                match queue.next(stop) {
                    None => {
                        stopped = true;
                        break;
                    }
                    Some(Ok(image)) => {
                        let (name, label) = (plan.source.name(sample), plan.source.label(sample));
                        writer.push(&name, label, &image)?;
                    }
                    Some(Err(one)) => {
                        writer.skip(one.clone());
                        bad.push(one);
                        if bad.len() > plan.max_bad {
                            return Err(too_many(plan, bad));
                        }
                    }
                }
                progress.add(1, bad.len());
            }
            if let Some(handle) = finishing.take() {
                join(handle)?;
                finished += 1;
                progress.note(finished, plan.missing.len());
            }
            if stopped {
                break;
            }
            finishing = Some(scope.spawn(move || writer.finish()));
        }
        if let Some(handle) = finishing {
            join(handle)?;
            finished += 1;
            progress.note(finished, plan.missing.len());
        }
        drop(closer);
        Ok(finished)
    })
}

/// A photo as the loader's simple crop wants it.
fn make(source: &Source, sample: usize, plan: &Plan) -> Result<Image, BadImage> {
    let image = source.read(sample)?;
    if plan.set.side == 0 {
        return Ok(image);
    }
    let size = short_side(image.height, image.width, plan.set.side as usize);
    if size == (image.height, image.width) {
        return Ok(image);
    }
    Ok(resize(&image, Rect::whole(&image), size, plan.set.interpolation))
}

/// Writes the list of bad photos, or removes that of an earlier run.
fn list(plan: &Plan, bad: &mut [BadImage]) -> Result<()> {
    bad.sort_by_key(|bad| bad.sample);
    let path = plan.out.join(BAD_IMAGES);
    if bad.is_empty() {
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &path)(error))
            }
            _ => Ok(()),
        };
    }
    let mut text = String::new();
    for bad in bad {
        let line = serde_json::to_string(bad).map_err(|e| Error::io("write", &path)(e.into()))?;
        text.push_str(&line);
        text.push('\n');
    }
    let aside = plan.out.join(format!("{BAD_IMAGES}.tmp"));
    fs::write(&aside, text)
        .and_then(|()| fs::rename(&aside, &path))
        .map_err(Error::io("write", &path))
}

fn too_many(plan: &Plan, bad: &[BadImage]) -> Error {
    let named: Vec<_> =
        bad.iter().take(3).map(|bad| format!("{} ({})", bad.name, bad.reason)).collect();
    Error::data(
        plan.source.path(),
        format!(
            "has more unreadable images than the {} that --max-bad-share allows: {}{}; repair or remove \
             them, or raise --max-bad-share",
            plan.max_bad,
            named.join(", "),
            if bad.len() > named.len() { ", .." } else { "" }
        ),
    )
}

/// What a thread made of a sample; or its panic.
type Made = thread::Result<Result<Image, BadImage>>;

/// Samples in order, made out of order, a bounded number ahead.
struct Queue<'a> {
    samples: &'a [usize],
    /// Places ahead of what was taken that may be under way.
    window: usize,
    state: Mutex<State>,
    /// Something was made.
    ready: Condvar,
    /// Something was taken, or the queue closed.
    room: Condvar,
}

#[derive(Default)]
struct State {
    begun: usize,
    taken: usize,
    made: HashMap<usize, Made>,
    closed: bool,
}

impl<'a> Queue<'a> {
    fn new(samples: &'a [usize], threads: usize) -> Self {
        /// Enough that a large photo does not hold up the others.
        const AHEAD: usize = 8;
        Self {
            samples,
            window: threads * AHEAD,
            state: Mutex::default(),
            ready: Condvar::new(),
            room: Condvar::new(),
        }
    }

    /// A poisoned lock is taken: what panicked is told by the thread's result.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes samples until all are made or the queue is closed.
    fn work(&self, make: impl Fn(usize) -> Result<Image, BadImage>) {
        loop {
            let mut state = self.lock();
            while !state.closed && state.begun >= state.taken + self.window {
                state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closed || state.begun == self.samples.len() {
                return;
            }
            let place = state.begun;
            state.begun += 1;
            drop(state);
            let made = catch_unwind(AssertUnwindSafe(|| make(self.samples[place])));
            self.lock().made.insert(place, made);
            self.ready.notify_one();
        }
    }

    /// The next sample, or `None` if `stop` turns true before it is made.
    fn next(&self, stop: &AtomicBool) -> Option<Result<Image, BadImage>> {
        /// How often `stop` is looked at.
        const POLL: Duration = Duration::from_millis(20);
        let mut state = self.lock();
        loop {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            let place = state.taken;
            if let Some(made) = state.made.remove(&place) {
                state.taken += 1;
                drop(state);
                self.room.notify_all();
                return Some(made.unwrap_or_else(|panic| resume_unwind(panic)));
            }
            let waited = self.ready.wait_timeout(state, POLL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Sends the threads home when the writer leaves, however it does.
struct Closer<'a>(&'a Queue<'a>);

impl Drop for Closer<'_> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.room.notify_all();
    }
}

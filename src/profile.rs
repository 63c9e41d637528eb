//! Where the time of some work goes: what ran when, for how long, and what it had to do.
//!
//! Every op opens a span. Spans are collected around any work of one thread, and cost a thread-local read elsewhere:
//!
//! ```
//! use pixmim::{Device, Tensor, profile};
//!
//! let dev = Device::cpu();
//! let mut tensor = Tensor::new(&dev, pixmim::DType::F32, &[1000])?;
//! let ((), profile) = profile::collect(&dev, || dev.clear(tensor.view_mut()))?;
//! let span = profile.spans().next().unwrap();
//! println!("{} took {:?} for {} bytes", span.name, span.took(), span.cost.unwrap().bytes);
//! # Ok::<(), pixmim::Error>(())
//! ```
//!
//! On the CPU, and on the host executor, times are the host's. On a GPU they are the stream's own: begin and end of a span
//! are marks between its kernels, so that what lies between two spans is time in which the stream had nothing to do. A mark
//! takes the stream about a microsecond. Nothing waits before the end of the work.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::time::Duration;

use crate::cuda::{Clock, HostClock};
use crate::ops::cost::Cost;
use crate::{Device, Error, Place, Result};

/// What [`collect`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Begin and end of everything, in order: first of the whole, last its end.
    marks: Vec<Duration>,
    entries: Vec<Entry>,
}

/// A span, by its marks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    name: &'static str,
    index: Option<usize>,
    depth: usize,
    cost: Option<Cost>,
    begin: usize,
    end: usize,
}

/// A piece of the work: an op, or a stage around ops.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// `attention::forward` for an op, `encoder` for a stage.
    pub name: &'static str,
    /// Which of several stages of the same name.
    pub index: Option<usize>,
    /// Spans around it.
    pub depth: usize,
    /// Of an op: its useful work.
    pub cost: Option<Cost>,
    /// Since the begin of the whole.
    pub begin: Duration,
    /// Since the begin of the whole.
    pub end: Duration,
}

impl Span {
    /// From begin to end.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.end.saturating_sub(self.begin)
    }
}

impl Profile {
    /// From the begin of the work to its end.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.marks.last().copied().unwrap_or_default()
    }

    /// All spans in the order of their begins: one that lies within another comes after it.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        self.entries.iter().map(|&Entry { name, index, depth, cost, begin, end }| {
            let [begin, end] = [begin, end].map(|mark| self.marks[mark]);
            Span { name, index, depth, cost, begin, end }
        })
    }

    /// The typical one of several profiles of the same work: between any two marks it took the median of their times. So
    /// a disturbance, which hits another op each time, names none.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none, or if they are not of the same work.
    pub fn median(profiles: &[Self]) -> Result<Self> {
        let Some(first) = profiles.first() else {
            return Err(Error::invalid("profiles", "holds none; collect at least one"));
        };
        if profiles.iter().any(|profile| profile.entries != first.entries) {
            let why = "are not of the same work; collect each around the same ops";
            return Err(Error::invalid("profiles", why));
        }
        let mut marks = vec![Duration::ZERO];
        for at in 1..first.marks.len() {
            let between = |profile: &Self| profile.marks[at].saturating_sub(profile.marks[at - 1]);
            let mut times: Vec<_> = profiles.iter().map(between).collect();
            marks.push(marks[at - 1] + median(&mut times));
        }
        Ok(Self { marks, entries: first.entries.clone() })
    }
}

/// The middle one, or the mean of the middle two.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    let middle = times.len() / 2;
    if times.len() % 2 == 1 { times[middle] } else { (times[middle - 1] + times[middle]) / 2 }
}

/// Does `work`, and tells where its time went: each op on this device that this thread calls, and each [`stage`].
///
/// On a GPU the work's kernels are launched one by one: a [`Recording`](crate::cuda::Recording) has no spans.
///
/// # Errors
/// Those of `work`; [`Error::Invalid`] within another `collect`; [`Error::Gpu`] where the stream's work cannot be timed, as
/// while it is recorded.
pub fn collect<R>(dev: &Device, work: impl FnOnce() -> Result<R>) -> Result<(R, Profile)> {
    if is_collecting() {
        let why = "is being collected on this thread already; end that before";
        return Err(Error::invalid("profile", why));
    }
    let mut clock: Box<dyn Clock> = match dev {
        Device::Cpu(_) => Box::new(HostClock::default()),
        Device::Cuda(gpu) => gpu.driver().clock()?,
    };
    clock.mark()?;
    let collector = Collector {
        place: dev.place(),
        clock,
        marks: 1,
        entries: vec![],
        open: vec![],
        failed: None,
    };
    COLLECTOR.set(Some(collector));
    let session = Session;
    COLLECTING.set(true);
    let done = work();
    let collector = end_collecting();
    drop(session);
    let done = done?;
    Ok((done, collector.finish()?))
}

/// The thread's collector, whose work is over.
fn end_collecting() -> Collector {
    COLLECTOR.take().expect("set where the work begins, and taken where it ends")
}

/// Whether this thread's spans are being collected.
#[inline]
pub(crate) fn is_collecting() -> bool {
    COLLECTING.get()
}

/// Opens a span around ops, to the end of the scope: `let _stage = profile::stage("encoder", None)`, or of several
/// `profile::stage("block", l)`.
pub fn stage(name: &'static str, index: impl Into<Option<usize>>) -> Entered {
    Entered::new(|collector| collector.begin(name, index.into(), None))
}

impl Device {
    /// Opens the span of an op, to the end of the scope. An op within an op is a part of it.
    #[inline]
    pub(crate) fn span(&self, name: &'static str, cost: impl FnOnce() -> Cost) -> Entered {
        Entered::new(|collector| {
            let counts = self.place() == collector.place && !collector.is_in_op();
            counts.then(|| collector.begin(name, None, Some(cost()))).flatten()
        })
    }

    /// As [`span`](Self::span), of something that moves so many bytes.
    #[inline]
    pub(crate) fn span_of_bytes(&self, name: &'static str, bytes: usize) -> Entered {
        self.span(name, || Cost { bytes: bytes as u64, flops: 0 })
    }
}

/// An open span. Ends when it is dropped.
#[must_use = "a span ends where this is dropped"]
#[derive(Debug)]
pub struct Entered {
    /// Its entry, if it is collected.
    entry: Option<usize>,
    /// The collector is this thread's.
    _here: PhantomData<*const ()>,
}

impl Entered {
    #[inline]
    fn new(begin: impl FnOnce(&mut Collector) -> Option<usize>) -> Self {
        let begin = || COLLECTOR.with_borrow_mut(|collector| collector.as_mut().and_then(begin));
        let entry = if is_collecting() { begin() } else { None };
        Self { entry, _here: PhantomData }
    }
}

impl Drop for Entered {
    #[inline]
    fn drop(&mut self) {
        let Some(entry) = self.entry else { return };
        COLLECTOR.with_borrow_mut(|collector| {
            if let Some(collector) = collector {
                collector.end(entry);
            }
        });
    }
}

thread_local! {
    /// Whether there is a collector: all that is read where there is none.
    static COLLECTING: Cell<bool> = const { Cell::new(false) };
    static COLLECTOR: RefCell<Option<Collector>> = const { RefCell::new(None) };
}

/// Ends collecting, also when the work panics.
struct Session;

impl Drop for Session {
    fn drop(&mut self) {
        COLLECTING.set(false);
        COLLECTOR.set(None);
    }
}

struct Collector {
    place: Place,
    clock: Box<dyn Clock>,
    marks: usize,
    entries: Vec<Entry>,
    /// Entries that have begun and not ended, outermost first.
    open: Vec<usize>,
    /// Why a mark could not be made; then no more are.
    failed: Option<Error>,
}

impl Collector {
    fn is_in_op(&self) -> bool {
        self.open.last().is_some_and(|&entry| self.entries[entry].cost.is_some())
    }

    /// The number of a new mark.
    fn mark(&mut self) -> Option<usize> {
        if self.failed.is_none() {
            self.failed = self.clock.mark().err();
        }
        self.failed.is_none().then(|| {
            self.marks += 1;
            self.marks - 1
        })
    }

    fn begin(
        &mut self,
        name: &'static str,
        index: Option<usize>,
        cost: Option<Cost>,
    ) -> Option<usize> {
        let (depth, begin) = (self.open.len(), self.mark()?);
        self.open.push(self.entries.len());
        self.entries.push(Entry { name, index, depth, cost, begin, end: begin });
        self.open.last().copied()
    }

    /// Ends an open span, and first what is open within it.
    fn end(&mut self, entry: usize) {
        while self.open.contains(&entry)
            && let Some(last) = self.open.pop()
            && let Some(mark) = self.mark()
        {
            self.entries[last].end = mark;
        }
    }

    fn finish(mut self) -> Result<Profile> {
        if let Some(&outermost) = self.open.first() {
            self.end(outermost);
        }
        self.mark();
        match self.failed {
            Some(error) => Err(error),
            None => Ok(Profile { marks: self.clock.read()?, entries: self.entries }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tensor;

    /// A profile of spans that end at these milliseconds, each of a `clear` that begins where the one before ended, and of
    /// a whole that ends with the last.
    fn profile(ends: &[u64]) -> Profile {
        let marks: Vec<_> = [0].iter().chain(ends).map(|&end| Duration::from_millis(end)).collect();
        let entry = |begin| Entry {
            name: "clear",
            index: None,
            depth: 0,
            cost: Some(Cost::default()),
            begin,
            end: begin + 1,
        };
        Profile { marks, entries: (0..ends.len()).map(entry).collect() }
    }

    /// Names with their numbers and depths.
    fn outline(profile: &Profile) -> Vec<(&str, Option<usize>, usize)> {
        profile.spans().map(|span| (span.name, span.index, span.depth)).collect()
    }

    fn tensor(elems: usize) -> Tensor {
        Tensor::new(&Device::cpu(), crate::DType::F32, &[elems]).unwrap()
    }

    #[test]
    fn spans_lie_within_others_and_tell_their_work() {
        let (dev, mut tensor) = (Device::cpu(), tensor(7));
        let (word, profile) = collect(&dev, || {
            let outer = stage("outer", None);
            dev.clear(tensor.view_mut())?;
            for l in 0..2 {
                let _block = stage("block", l);
                dev.upload(tensor.view_mut(), &[1f32; 7])?;
            }
            drop(outer);
            dev.clear(tensor.view_mut())?;
            Ok("done")
        })
        .unwrap();
        assert_eq!(word, "done");
        let expected = [
            ("outer", None, 0),
            ("clear", None, 1),
            ("block", Some(0), 1),
            ("upload", None, 2),
            ("block", Some(1), 1),
            ("upload", None, 2),
            ("clear", None, 0),
        ];
        assert_eq!(outline(&profile), expected);
        for span in profile.spans() {
            let is_op = !["outer", "block"].contains(&span.name);
            assert_eq!(span.cost, is_op.then_some(Cost { bytes: 28, flops: 0 }), "{span:?}");
            assert!(span.begin <= span.end && span.end <= profile.took(), "{span:?}");
        }
        let spans: Vec<_> = profile.spans().collect();
        assert!(spans[0].begin <= spans[1].begin && spans[5].end <= spans[0].end);
        assert!(spans[1].end <= spans[2].begin && spans[0].end <= spans[6].begin);
    }

    #[test]
    fn an_op_within_an_op_is_a_part_of_it_and_what_is_left_open_ends_with_the_whole() {
        let (dev, mut tensor) = (Device::cpu(), tensor(3));
        let ((), profile) = collect(&dev, || {
            let op = dev.span("op", Cost::default);
            dev.clear(tensor.view_mut())?;
            drop(op);
            let outer = stage("outer", None);
            std::mem::forget(stage("forgotten", None));
            drop(outer);
            std::mem::forget(stage("open", None));
            Ok(())
        })
        .unwrap();
        let expected =
            [("op", None, 0), ("outer", None, 0), ("forgotten", None, 1), ("open", None, 0)];
        assert_eq!(outline(&profile), expected);
        assert!(profile.spans().all(|span| span.end <= profile.took()));
    }

    #[test]
    fn nothing_is_collected_after_an_error_or_a_panic_or_within_another() {
        let dev = Device::cpu();
        let refused = collect(&dev, || Err::<(), _>(Error::invalid("work", "is none")));
        assert_eq!(refused.unwrap_err().to_string(), "`work` is none");
        let panicked =
            std::panic::catch_unwind(|| collect(&Device::cpu(), || -> Result<()> { panic!() }));
        assert!(panicked.is_err() && !is_collecting());
        let (inner, profile) = collect(&dev, || Ok(collect(&dev, || Ok(())))).unwrap();
        assert!(inner.unwrap_err().to_string().contains("already"));
        // The inner one has not ended the outer one.
        assert_eq!(profile.spans().count(), 0);
        drop(stage("nobody looks", None));
        let ((), profile) = collect(&dev, || {
            drop(stage("stage", 3));
            Ok(())
        })
        .unwrap();
        assert_eq!(outline(&profile), [("stage", Some(3), 0)]);
    }

    #[test]
    fn a_thread_collects_its_own_spans() {
        let ((), profile) = collect(&Device::cpu(), || {
            let elsewhere = std::thread::spawn(|| drop(stage("elsewhere", None)));
            elsewhere.join().unwrap();
            Ok(())
        })
        .unwrap();
        assert_eq!(profile.spans().count(), 0);
    }

    #[cfg(pixmim_simt)]
    #[test]
    fn of_a_gpu_its_own_ops_count_and_not_those_of_the_host() {
        let gpu = crate::Gpu::simt(crate::cuda::SimtOptions::default()).unwrap();
        let (host, dev) = (Device::cpu(), Device::Cuda(gpu.clone()));
        let mut here = tensor(5);
        let mut there = Tensor::new(&dev, crate::DType::F32, &[5]).unwrap();
        let ((), profile) = collect(&dev, || {
            host.clear(here.view_mut())?;
            dev.clear(there.view_mut())?;
            dev.copy(there.view_mut(), here.view())?;
            dev.read::<f32>(there.view()).map(drop)
        })
        .unwrap();
        assert_eq!(outline(&profile), ["clear", "upload", "read"].map(|op| (op, None, 0)));
        let recorded = gpu.record(|| collect(&dev, || Ok(())).map(drop));
        assert!(recorded.unwrap_err().to_string().contains("being recorded"));
    }

    #[test]
    fn the_median_takes_each_time_between_marks_by_itself() {
        // Each profile is disturbed at another place; together none is.
        let profiles = [profile(&[9, 11, 14]), profile(&[1, 9, 12]), profile(&[1, 3, 50])];
        assert_eq!(Profile::median(&profiles).unwrap(), profile(&[1, 3, 6]));
        assert_eq!(Profile::median(&profiles[..2]).unwrap(), profile(&[5, 10, 13]));
        assert!(Profile::median(&[]).is_err());
        assert!(Profile::median(&[profile(&[1]), profile(&[1, 2])]).is_err());
    }
}

//! Finds the fastest algorithm for a product by running each on data of the real sizes.
//!
//! Heuristics are right nine times out of ten, and cannot know the machine. The data are random: on zeros a GPU draws less
//! power and clocks higher, and the wrong algorithm may win. They are the plan's own, never the caller's.

use super::descriptors::{Addresses, Algorithm, Product};
use super::problem::{Add, Problem};
use super::{Lane, Plans};
use crate::cuda::nvidia::{Event, Memory, Stream, upload, within_gpu};
use crate::rng::philox4x32_10;
use crate::{DType, Error, Result};

/// Runs of each algorithm that is not clearly slower; the median counts.
const ROUNDS: usize = 5;
/// Algorithms so much slower than the best at first sight get no further run.
const HOPELESS: f32 = 1.3;
/// Times so close are equal, and the earlier candidate wins: two runs of a program should agree.
const EQUAL: f32 = 1.02;
/// Shortest stretch of work that is timed, in milliseconds: events are exact to about a microsecond.
const STRETCH: f32 = 0.2;
/// Most runs in a stretch.
const MOST_RUNS: u32 = 20;
/// Random bytes, repeated to fill the scratch.
const PATTERN_BYTES: usize = 1 << 20;

/// Matrices to multiply while timing.
struct Scratch {
    a: Memory,
    b: Memory,
    out: Memory,
    add: Option<Memory>,
    vector: Option<Memory>,
    aux: Option<Memory>,
}

impl Scratch {
    /// [`Error::OutOfMemory`] if there is no room beside what is already on the GPU.
    fn new(problem: &Problem, stream: &Stream) -> Result<Self> {
        let shape = problem.column_major();
        let random = |bytes, dtype| {
            let memory = Memory::new(bytes, "timing a product")?;
            fill(&memory, bytes, dtype, stream)?;
            Ok(memory)
        };
        let (factors, result) = (problem.factors(), problem.result());
        let out_bytes = problem.bytes(&shape.out, result);
        let add = (problem.add() == Add::Other).then(|| random(out_bytes, result));
        let vector = problem.vector().map(|count| random(count * result.size_bytes(), result));
        let aux = problem.has_aux().then(|| random(out_bytes, result));
        Ok(Self {
            a: random(problem.bytes(&shape.a, factors), factors)?,
            b: random(problem.bytes(&shape.b, factors), factors)?,
            out: random(out_bytes, result)?,
            add: add.transpose()?,
            vector: vector.transpose()?,
            aux: aux.transpose()?,
        })
    }

    fn addresses(&self) -> Addresses {
        Addresses {
            a: self.a.address(),
            b: self.b.address(),
            c: self.add.as_ref().unwrap_or(&self.out).address(),
            d: self.out.address(),
            vector: self.vector.as_ref().map_or(0, Memory::address),
            aux: self.aux.as_ref().map_or(0, Memory::address),
        }
    }
}

/// Index of the best algorithm; the first if there is no memory to try them.
pub(super) fn fastest(
    plans: &Plans,
    problem: &Problem,
    product: &mut Product,
    candidates: &[Algorithm],
    lane: Lane<'_>,
) -> Result<usize> {
    if candidates.len() < 2 {
        return Ok(0);
    }
    let scratch = match Scratch::new(problem, lane.stream) {
        Err(Error::OutOfMemory { .. }) => return Ok(0),
        scratch => scratch?,
    };
    let (start, end) = (Event::timed()?, Event::timed()?);
    let stream = lane.stream;
    let mut stretch = |algorithm: &Algorithm, runs: u32| -> Result<f32> {
        start.record(stream)?;
        for _ in 0..runs {
            plans.multiply(problem, product, algorithm, scratch.addresses(), lane)?;
        }
        end.record(stream)?;
        end.synchronize()?;
        Ok(end.milliseconds_since(&start)? / runs as f32)
    };

    // The first run loads the kernel; an algorithm that refuses is none.
    let mut trials: Vec<(u32, Vec<f32>)> = Vec::with_capacity(candidates.len());
    for algorithm in candidates {
        let trial = if stretch(algorithm, 1).is_err() {
            (0, Vec::new())
        } else {
            let once = stretch(algorithm, 1)?;
            let runs = (STRETCH / once).ceil().clamp(1.0, MOST_RUNS as f32) as u32;
            (runs, vec![stretch(algorithm, runs)?])
        };
        trials.push(trial);
    }
    let best =
        trials.iter().filter_map(|(_, times)| times.first()).copied().fold(f32::MAX, f32::min);
    for _ in 1..ROUNDS {
        for (algorithm, (runs, times)) in candidates.iter().zip(&mut trials) {
            if times.first().is_some_and(|time| *time <= best * HOPELESS) {
                times.push(stretch(algorithm, *runs)?);
            }
        }
    }
    let medians: Vec<_> = trials.into_iter().map(|(_, times)| median(times)).collect();
    pick(&medians).ok_or_else(|| Error::Gpu {
        action: "multiply",
        why: format!("{problem}: cublasLt offers {} algorithms and refuses each", candidates.len()),
    })
}

fn median(mut times: Vec<f32>) -> Option<f32> {
    times.sort_by(f32::total_cmp);
    times.get(times.len() / 2).copied()
}

/// The earliest of the times that are as good as the best.
fn pick(times: &[Option<f32>]) -> Option<usize> {
    let best = times.iter().flatten().copied().fold(f32::MAX, f32::min);
    times.iter().position(|time| time.is_some_and(|time| time <= best * EQUAL))
}

/// Enqueues random numbers.
fn fill(memory: &Memory, bytes: usize, dtype: DType, stream: &Stream) -> Result<()> {
    let pattern = pattern(bytes.min(PATTERN_BYTES), dtype);
    upload(memory.address(), &pattern, stream)?;
    let mut filled = pattern.len();
    while filled < bytes {
        let more = filled.min(bytes - filled);
        within_gpu(memory.address() + filled as u64, memory.address(), more, stream)?;
        filled += more;
    }
    Ok(())
}

/// Random numbers of size 0.5 to 1 and either sign, as bytes.
fn pattern(bytes: usize, dtype: DType) -> Vec<u8> {
    // Sign and mantissa are random, the exponent is that of 0.5.
    let (random, fixed) = match dtype {
        DType::Bf16 => (0x807F_807F, 0x3F00_3F00),
        _ => (0x807F_FFFF_u32, 0x3F00_0000_u32),
    };
    let words =
        (0..bytes.div_ceil(16) as u32).flat_map(|index| philox4x32_10([index, 0, 0, 0], [1, 0]));
    let mut pattern: Vec<u8> =
        words.flat_map(|word| (word & random | fixed).to_le_bytes()).collect();
    pattern.truncate(bytes);
    pattern
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn times_within_two_percent_go_to_the_earlier_candidate() {
        assert_eq!(pick(&[Some(1.0), Some(0.99), Some(2.0)]), Some(0));
        assert_eq!(pick(&[Some(1.0), Some(0.97), Some(0.96)]), Some(1));
        assert_eq!(pick(&[None, Some(3.0), None, Some(2.0)]), Some(3));
        assert_eq!(pick(&[None, None]), None);
        assert_eq!(pick(&[]), None);
    }

    #[test]
    fn the_median_ignores_one_slow_run() {
        assert_eq!(median(vec![1.0, 9.0, 1.1, 1.2, 1.05]), Some(1.1));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn scratch_holds_numbers_of_both_signs_and_no_zero() {
        let bytes = pattern(1001 * 4, DType::F32);
        let f32s: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let bytes = pattern(1001 * 2, DType::Bf16);
        let bf16s: Vec<f32> = bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect();
        for numbers in [f32s, bf16s] {
            assert_eq!(numbers.len(), 1001);
            assert!(numbers.iter().all(|x| (0.5..1.0).contains(&x.abs())));
            assert!(numbers.iter().any(|x| *x < 0.0) && numbers.iter().any(|x| *x > 0.0));
            assert!(numbers.windows(2).filter(|w| w[0] == w[1]).count() < 50);
        }
    }
}

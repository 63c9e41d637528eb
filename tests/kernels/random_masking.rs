//! Masks: the ids of the CPU, bit for bit.

use pixmim::ops::random_masking::{Forward, Noise, forward, workspace_bytes};
use pixmim::rng::{Purpose, Stream};
use pixmim::{DType, Device, Error, Result};

use crate::common::{Input, Output, gpu, same_on_any_schedule, workspace};

/// Sides in patches of an image and of a block, and patches kept.
#[derive(Clone, Copy, Debug)]
struct Size {
    grid: usize,
    block: usize,
    kept: usize,
}

/// Kept, masked and restoring ids, one after another.
fn run(dev: &Device, seed: u64, epoch: i64, samples: &[i64], size: Size) -> Vec<i32> {
    let (images, patches) = (samples.len(), size.grid * size.grid);
    let ids = |each| Output::new(dev, DType::I32, &[images, each]);
    let (mut keep, mut masked, mut restore) =
        (ids(size.kept), ids(patches - size.kept), ids(patches));
    let (epoch, samples) = (Input::new(dev, &[epoch], &[1]), Input::new(dev, samples, &[images]));
    let mut work = workspace(dev, workspace_bytes(dev, images, patches));
    let args = Forward {
        ids_keep: keep.view(),
        ids_masked: masked.view(),
        ids_restore: restore.view(),
        noise: Noise::Drawn { seed, epoch: epoch.view(), samples: samples.view() },
        block: size.block,
        workspace: work.view(),
    };
    forward(dev, args).unwrap();
    [keep, masked, restore].map(|ids| ids.values()).concat()
}

#[track_caller]
fn same_as_cpu(seed: u64, epoch: i64, samples: &[i64], size: Size) {
    let (got, want) =
        (run(&gpu(), seed, epoch, samples, size), run(&Device::cpu(), seed, epoch, samples, size));
    assert!(got == want, "other ids: seed {seed:#x}, epoch {epoch}, {samples:?}, {size:?}");
}

#[test]
fn any_grid_and_block_gives_the_ids_of_the_cpu() {
    for (grid, kept) in [(2, 1), (2, 3), (3, 2), (5, 7), (7, 12), (8, 16), (14, 49), (16, 64)] {
        for block in [1, 2, 3, 4, grid - 1, grid] {
            if (1..=grid).contains(&block) {
                same_as_cpu(7, 3, &[0, 1, 41], Size { grid, block, kept });
            }
        }
    }
}

#[test]
fn long_sequences_are_sorted_too() {
    for (grid, block) in [(33, 1), (64, 1), (65, 2)] {
        same_as_cpu(1, 0, &[5], Size { grid, block, kept: grid * grid / 4 });
    }
}

#[test]
fn any_seed_epoch_and_sample_gives_the_ids_of_the_cpu() {
    // The order of an image's ids shows all its words: together a million of them.
    let keys = Stream::new(99, 0, 0, Purpose::Init);
    for run in 0..20 {
        let [a, b, epoch, _] = keys.block(300 * run);
        let seed = u64::from(a) << 32 | u64::from(b);
        let sample = |i| {
            let [high, low, ..] = keys.block(300 * run + 1 + i);
            i64::from(high >> 8) << 32 | i64::from(low)
        };
        let samples: Vec<i64> = (0..256).map(sample).collect();
        same_as_cpu(seed, i64::from(epoch >> 4), &samples, Size { grid: 14, block: 1, kept: 49 });
    }
    let edges = [0, 1, 0xffff_ffff, 1 << 32, (1 << 32) + 1, 1 << 59];
    for seed in [0, 1, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        for epoch in [0, 799, (1 << 28) - 1] {
            same_as_cpu(seed, epoch, &edges, Size { grid: 7, block: 1, kept: 12 });
        }
    }
}

#[test]
fn schedules_change_no_bit() {
    let samples: Vec<i64> = (0..5).collect();
    for size in [Size { grid: 14, block: 1, kept: 49 }, Size { grid: 15, block: 4, kept: 50 }] {
        same_on_any_schedule(|dev| run(dev, 1, 2, &samples, size));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let call = |grid: usize, noise: Noise<'_>, dtype| -> Error {
        let patches = grid * grid;
        let mut keep = Output::new(&dev, dtype, &[2, 1]);
        let mut masked = Output::new(&dev, DType::I32, &[2, patches - 1]);
        let mut restore = Output::new(&dev, DType::I32, &[2, patches]);
        let mut work = workspace(&dev, 0);
        let args = Forward {
            ids_keep: keep.view(),
            ids_masked: masked.view(),
            ids_restore: restore.view(),
            noise,
            block: 1,
            workspace: work.view(),
        };
        let result: Result<()> = forward(&dev, args);
        result.unwrap_err()
    };
    let (epoch, samples) = (Input::new(&dev, &[0i64], &[1]), Input::new(&dev, &[3i64, 4], &[2]));
    let host = [3i64, 4];
    let on_host = pixmim::TensorRef::new(&host, &[2]).unwrap();
    let drawn = |samples| Noise::Drawn { seed: 1, epoch: epoch.view(), samples };

    let err = call(3, drawn(samples.view()), DType::I64);
    assert!(matches!(err, Error::DType { arg: "ids_keep", .. }), "{err}");
    let err = call(3, drawn(on_host), DType::I32);
    assert!(matches!(err, Error::Place { arg: "noise.samples", .. }), "{err}");
    let three = Input::new(&dev, &[3i64, 4, 5], &[3]);
    let err = call(3, drawn(three.view()), DType::I32);
    assert!(matches!(err, Error::Shape { arg: "noise.samples", .. }), "{err}");
    let (_, odd) = three.view().split_at(1);
    let err = call(3, drawn(odd), DType::I32);
    assert!(err.to_string().contains("starts at a multiple of 16"), "{err}");
    let noise = Input::new(&dev, &[0.5f64; 18], &[2, 9]);
    let err = call(3, Noise::Given(noise.view()), DType::I32);
    let want =
        "`random_masking: noise` is given, which only the CPU takes; a GPU draws it from a seed";
    assert_eq!(err.to_string(), want);
    let err = call(257, drawn(samples.view()), DType::I32);
    assert!(err.to_string().contains("take a larger block"), "{err}");
}

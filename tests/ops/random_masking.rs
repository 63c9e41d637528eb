//! Masks: golden orders, blocks, what a draw depends on, and that every patch has the same chance.

use pixmim::ops::random_masking::{Forward, Noise, forward, kept, workspace_bytes};
use pixmim::rng::{Purpose, Stream};
use pixmim::{DType, Error, Result};

use crate::common::{Guarded, cpu, for_any, same_on_any_threads, uniform, view, workspace};
use crate::refusal::{Any, Arg, arg, refusal, refuses_what_does_not_fit, workspace_arg};

#[derive(Debug, PartialEq)]
struct Masks {
    keep: Vec<i32>,
    masked: Vec<i32>,
    restore: Vec<i32>,
}

fn run(images: usize, patches: usize, kept: usize, block: usize, noise: Noise<'_>) -> Masks {
    let mut keep = Guarded::<i32>::poisoned(&[images, kept]);
    let mut masked = Guarded::<i32>::poisoned(&[images, patches - kept]);
    let mut restore = Guarded::<i32>::poisoned(&[images, patches]);
    let mut work = workspace(workspace_bytes(&cpu(), images, patches));
    let args = Forward {
        ids_keep: keep.view(),
        ids_masked: masked.view(),
        ids_restore: restore.view(),
        noise,
        block,
        workspace: work.view(),
    };
    forward(&cpu(), args).unwrap();
    work.values();
    Masks { keep: keep.values(), masked: masked.values(), restore: restore.values() }
}

fn given(patches: usize, kept: usize, block: usize, noise: &[f64]) -> Masks {
    run(1, patches, kept, block, Noise::Given(view(noise, &[1, noise.len()])))
}

fn drawn(seed: u64, epoch: i64, samples: &[i64], [patches, kept, block]: [usize; 3]) -> Masks {
    let images = samples.len();
    let samples = view(samples, &[images]);
    run(images, patches, kept, block, Noise::Drawn { seed, epoch: view(&[epoch], &[1]), samples })
}

/// The masks of one image whose patches come in this order.
fn of_order(order: &[i32], kept: usize) -> Masks {
    let place = |patch| order.iter().position(|&id| id == patch).unwrap() as i32;
    Masks {
        keep: order[..kept].to_vec(),
        masked: order[kept..].to_vec(),
        restore: (0..order.len() as i32).map(place).collect(),
    }
}

/// The patches in the order of their blocks: in a block, columns outside and rows inside.
fn order_of_blocks(grid: usize, block: usize, blocks: &[usize]) -> Vec<i32> {
    let across = grid.div_ceil(block);
    let mut order = vec![];
    for id in blocks {
        for x in 0..block {
            for y in 0..block {
                let (row, column) = (id / across * block + y, id % across * block + x);
                if row < grid && column < grid {
                    order.push((row * grid + column) as i32);
                }
            }
        }
    }
    order
}

/// `0..count`, by ascending key, equal keys as they were.
fn sorted_by<K: PartialOrd>(count: usize, key: impl Fn(usize) -> K) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| key(a).partial_cmp(&key(b)).unwrap());
    order
}

#[test]
fn patches_are_shuffled_by_ascending_noise_and_the_first_are_kept() {
    // The published case has eight patches; a ninth with the largest noise makes them a square.
    let noise = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 1.0];
    let masks = given(9, 2, 1, &noise);
    assert_eq!(masks.keep, [1, 5]);
    assert_eq!(masks.masked, [3, 7, 2, 4, 6, 0, 8]);
    assert_eq!(masks.restore, [7, 0, 4, 2, 5, 1, 6, 3, 8]);
}

#[test]
fn blocks_are_shuffled_whole_and_go_down_their_columns_first() {
    // Ascending, the blocks come in the order 2, 0, 3, 1.
    let masks = given(16, 4, 2, &[0.2, 0.4, 0.1, 0.3]);
    let order = [8, 12, 9, 13, 0, 4, 1, 5, 10, 14, 11, 15, 2, 6, 3, 7];
    assert_eq!(masks, of_order(&order, 4));
}

#[test]
fn any_block_on_any_grid_gives_the_naive_order() {
    for_any((2usize..=9, 1usize..=9, 0u64..1000), |(grid, block, seed)| {
        let block = block.min(grid);
        let across = grid.div_ceil(block);
        let noise: Vec<f64> = uniform(seed, &[across * across]);
        let blocks = sorted_by(across * across, |i| noise[i]);
        let order = order_of_blocks(grid, block, &blocks);
        // Not a multiple of a block: the last one is cut.
        let kept = grid * grid / 4;
        assert_eq!(given(grid * grid, kept, block, &noise), of_order(&order, kept));
    });
}

#[test]
fn equal_noise_keeps_the_order() {
    let masks = given(9, 3, 1, &[0.5, 0.5, 0.1, 0.5, 0.1, 0.5, 0.1, 0.5, 0.5]);
    assert_eq!([masks.keep, masks.masked].concat(), [2, 4, 6, 0, 1, 3, 5, 7, 8]);
}

#[test]
fn drawn_masks_sort_the_words_of_their_stream() {
    for (seed, epoch, sample) in [(0, 0, 0), (7, 3, 41), (u64::MAX, 799, 1_281_166)] {
        for (grid, block) in [(14usize, 1), (8, 2), (7, 3)] {
            let across = grid.div_ceil(block);
            let words = Stream::new(seed, epoch, sample as u64, Purpose::Mask);
            let blocks = sorted_by(across * across, |i| words.word(i as u32));
            let order = order_of_blocks(grid, block, &blocks);
            let kept = kept(grid * grid, 0.75);
            let masks = drawn(seed, i64::from(epoch), &[sample], [grid * grid, kept, block]);
            assert_eq!(masks, of_order(&order, kept), "{grid} {block} {sample}");
        }
    }
}

#[test]
fn each_image_keeps_and_masks_every_patch_once() {
    let samples: Vec<i64> = (0..37).collect();
    let masks = drawn(5, 2, &samples, [196, 49, 1]);
    for b in 0..37 {
        let (keep, masked) = (&masks.keep[b * 49..][..49], &masks.masked[b * 147..][..147]);
        let order = [keep, masked].concat();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..196).collect::<Vec<i32>>());
        for (place, &patch) in order.iter().enumerate() {
            assert_eq!(masks.restore[b * 196 + patch as usize], place as i32);
        }
    }
}

#[test]
fn a_draw_depends_on_seed_epoch_and_sample_and_not_on_the_place_in_the_batch() {
    let keep = |seed, epoch, samples: &[i64]| drawn(seed, epoch, samples, [196, 49, 1]).keep;
    let both = keep(5, 2, &[30, 31]);
    assert_eq!(keep(5, 2, &[31, 30]), [&both[49..], &both[..49]].concat());
    let one = keep(5, 2, &[30]);
    assert_eq!(one, both[..49]);
    for other in [keep(6, 2, &[30]), keep(5, 3, &[30]), keep(5, 2, &[31])] {
        assert_ne!(other, one);
    }
}

#[test]
fn every_patch_is_kept_equally_often() {
    const IMAGES: usize = 4000;
    let samples: Vec<i64> = (0..IMAGES as i64).collect();
    let masks = drawn(1, 0, &samples, [196, 49, 1]);
    let mut times = [0usize; 196];
    masks.keep.iter().for_each(|&id| times[id as usize] += 1);
    // Binomial with p = 1/4: five standard deviations.
    let (mean, five) = (IMAGES as f64 / 4.0, 5.0 * (IMAGES as f64 * 0.1875).sqrt());
    for (patch, &times) in times.iter().enumerate() {
        assert!((times as f64 - mean).abs() <= five, "patch {patch}: {times} times");
    }
}

#[test]
fn the_number_of_kept_patches_is_rounded_down() {
    for (patches, ratio, want) in
        [(196, 0.75, 49), (256, 0.75, 64), (784, 0.75, 196), (49, 0.75, 12), (196, 0.8, 39)]
    {
        assert_eq!(kept(patches, ratio), want, "{patches} {ratio}");
    }
}

#[test]
fn threads_change_no_bit() {
    let samples: Vec<i64> = (0..50).collect();
    same_on_any_threads(|| {
        let Masks { keep, masked, restore } = drawn(1, 0, &samples, [196, 49, 2]);
        [keep, masked, restore].concat()
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let ids = |name, shape: &[usize]| arg(name, DType::I32, shape);
    let args = |kept, masked, noise| {
        vec![
            ids("ids_keep", &[2, kept]),
            ids("ids_masked", &[2, masked]),
            ids("ids_restore", &[2, kept + masked]),
            noise,
            workspace_arg(workspace_bytes(&cpu(), 2, kept + masked)),
        ]
    };
    let samples = || arg("noise.samples", DType::I64, &[2]);
    let noise = || arg("noise", DType::F64, &[2, 9]);
    let call = |t: &mut [Any], drawn: bool, block| -> Result<()> {
        let [keep, masked, restore, noise, workspace] = t else { unreachable!() };
        let noise = match drawn {
            true => Noise::Drawn { seed: 1, epoch: view(&[0i64], &[1]), samples: noise.view() },
            false => Noise::Given(noise.view()),
        };
        let args = Forward {
            ids_keep: keep.view_mut(),
            ids_masked: masked.view_mut(),
            ids_restore: restore.view_mut(),
            noise,
            block,
            workspace: workspace.view_mut(),
        };
        forward(&cpu(), args)
    };
    let op = "random_masking::forward";
    refuses_what_does_not_fit(op, &args(6, 19, samples()), &|t| call(t, true, 2));
    refuses_what_does_not_fit(op, &args(6, 19, noise()), &|t| call(t, false, 2));

    let good = || Any::new(DType::I32, &[2, 6]);
    let refused = |args: &[Arg], block| -> Error {
        refusal(args, &|t| call(t, true, block), "ids_keep", good())
    };
    for block in [0, 6] {
        let err = refused(&args(6, 19, samples()), block);
        let want =
            format!("`random_masking: block` is {block}, must be 1 to the 5 patches of a side");
        assert_eq!(err.to_string(), want);
    }
    let err = refused(&args(6, 18, samples()), 1);
    let want = "random_masking::forward: `ids_restore` has shape [2, 24], \
                expected (B, L) with a square number L of patches";
    assert_eq!(err.to_string(), want);
    let mut bad = [0.5; 18];
    bad[17] = f64::NAN;
    let bad = Any::holding(&bad, &[2, 9]);
    let err = refusal(&args(6, 19, noise()), &|t| call(t, false, 2), "noise", bad);
    assert_eq!(err.to_string(), "`random_masking: noise` holds NaN");
}

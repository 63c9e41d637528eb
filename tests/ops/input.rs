//! Crop, flip, reflection, normalisation and the two orders of a patch's numbers.

use pixmim::ops::input::{Forward, Geometry, Target, forward};
use pixmim::{DType, Error, Result};
use proptest::prelude::any;

use crate::common::{
    Guarded, Real, close, cpu, for_any, masks, same_on_any_threads, uniform, view,
};
use crate::refusal::{Any, arg, refusal, refuses_numbers, refuses_what_does_not_fit};

const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

/// An image and what is cropped from it.
#[derive(Clone, Debug)]
struct Picture {
    height: usize,
    width: usize,
    bytes: Vec<u8>,
    top: i64,
    left: i64,
    flip: bool,
}

impl Picture {
    fn new(seed: u64, [height, width]: [usize; 2], top: i64, left: i64, flip: bool) -> Self {
        let numbers: Vec<f64> = uniform(seed, &[height, width, 3]);
        let bytes = numbers.iter().map(|x| (127.5 + 128.0 * x) as u8).collect();
        Self { height, width, bytes, top, left, flip }
    }

    /// Where step `i` along an axis lands, walking to and fro between its ends.
    fn bounce(i: i64, extent: usize) -> usize {
        let (mut at, mut step) = (0i64, if i < 0 { -1 } else { 1 });
        for _ in 0..i.abs() {
            if at + step < 0 || at + step >= extent as i64 {
                step = -step;
            }
            at += step;
        }
        at as usize
    }

    /// Channel `c` of pixel (y, x) of the crop of `side`, on [0, 1].
    fn pixel(&self, side: usize, c: usize, y: usize, x: usize) -> f64 {
        let x = if self.flip { side - 1 - x } else { x };
        let row = Self::bounce(self.top + y as i64, self.height);
        let column = Self::bounce(self.left + x as i64, self.width);
        f64::from(self.bytes[(row * self.width + column) * 3 + c]) / 255.0
    }
}

/// Crops of `grid` patches of `patch` pixels a side.
#[derive(Clone, Debug)]
struct Batch {
    pictures: Vec<Picture>,
    grid: usize,
    patch: usize,
    keep: Vec<i32>,
    masked: Vec<i32>,
}

impl Batch {
    fn new(pictures: Vec<Picture>, grid: usize, patch: usize, kept: usize) -> Self {
        let masks = masks(3, pictures.len(), grid * grid, kept);
        Self { pictures, grid, patch, keep: masks.keep, masked: masks.masked }
    }

    fn side(&self) -> usize {
        self.grid * self.patch
    }

    /// The patches, and the target or (`filtered`) the pixels.
    fn run<T: Real>(&self, filtered: bool) -> [Vec<T>; 2] {
        let images = self.pictures.len();
        let (kept, masked) = (self.keep.len() / images, self.masked.len() / images);
        let numbers = 3 * self.patch * self.patch;
        let (mut bytes, mut geometry) = (vec![7; 5], vec![]);
        for p in &self.pictures {
            let (offset, flip) = (bytes.len() as i64, i64::from(p.flip));
            geometry.extend([offset, p.height as i64, p.width as i64, p.top, p.left, flip]);
            bytes.extend(&p.bytes);
        }
        let mut patches = Guarded::poisoned(&[images, kept, numbers]);
        let mut other = match filtered {
            true => Guarded::poisoned(&[images, 3, self.side(), self.side()]),
            false => Guarded::poisoned(&[images, masked, numbers]),
        };
        let target = match filtered {
            true => Target::Filtered { pixels: other.view() },
            false => Target::Raw {
                target: other.view(),
                ids_masked: view(&self.masked, &[images, masked]),
            },
        };
        let args = Forward {
            patches: patches.view(),
            target,
            images: view(&bytes, &[bytes.len()]),
            geometry: view(&geometry, &[images, 6]),
            ids_keep: view(&self.keep, &[images, kept]),
            mean: MEAN,
            std: STD,
            patch_size: self.patch,
        };
        forward(&cpu(), args).unwrap();
        [patches.values(), other.values()]
    }

    /// Number `e` of patch `id`, for the given order of (channel, row, column) in a patch.
    fn number(&self, b: usize, id: i32, [c, y, x]: [usize; 3]) -> f64 {
        let (row, column) = (id as usize / self.grid, id as usize % self.grid);
        let (y, x) = (row * self.patch + y, column * self.patch + x);
        let pixel = self.pictures[b].pixel(self.side(), c, y, x);
        (pixel - MEAN[c]) / STD[c]
    }

    fn naive(&self, ids: &[i32], channel_first: bool) -> Vec<f64> {
        let (p, each) = (self.patch, ids.len() / self.pictures.len());
        let mut out = vec![];
        for (i, &id) in ids.iter().enumerate() {
            for e in 0..3 * p * p {
                let at = match channel_first {
                    true => [e / (p * p), e / p % p, e % p],
                    false => [e % 3, e / 3 / p, e / 3 % p],
                };
                out.push(self.number(i / each, id, at));
            }
        }
        out
    }

    fn naive_pixels(&self) -> Vec<f64> {
        let side = self.side();
        let mut out = vec![];
        for picture in &self.pictures {
            for at in 0..3 * side * side {
                let (c, y, x) = (at / side / side, at / side % side, at % side);
                out.push(picture.pixel(side, c, y, x));
            }
        }
        out
    }

    fn check(&self) {
        let [patches, target] = self.run::<f64>(false);
        close("patches", &patches, &self.naive(&self.keep, true), 1e-14);
        close("target", &target, &self.naive(&self.masked, false), 1e-14);
        let [patches, pixels] = self.run::<f64>(true);
        close("patches", &patches, &self.naive(&self.keep, true), 1e-14);
        close("pixels", &pixels, &self.naive_pixels(), 1e-16);
        let [patches, target] = self.run::<f32>(false);
        close("patches in f32", &patches, &self.naive(&self.keep, true), 2e-7);
        close("target in f32", &target, &self.naive(&self.masked, false), 2e-7);
        close("pixels in f32", &self.run::<f32>(true)[1], &self.naive_pixels(), 3e-8);
    }
}

#[test]
fn an_edge_is_reflected_without_being_repeated() {
    // Six pixels, and four more at each end.
    let want = [4u8, 3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2, 1];
    let picture = Picture {
        bytes: (0..6u8).flat_map(|x| [x; 3]).collect::<Vec<u8>>().repeat(8),
        ..Picture::new(1, [8, 6], 0, -4, false)
    };
    let [_, pixels] = Batch::new(vec![picture.clone()], 7, 2, 9).run::<f64>(true);
    let want: Vec<f64> = want.iter().map(|&x| f64::from(x) / 255.0).collect();
    close("first row", &pixels[..14], &want, 0.0);
    let flipped = Picture { flip: true, ..picture };
    let [_, pixels] = Batch::new(vec![flipped], 7, 2, 9).run::<f64>(true);
    let mirrored: Vec<f64> = want.into_iter().rev().collect();
    close("first row, mirrored", &pixels[..14], &mirrored, 0.0);
}

#[test]
fn a_patch_runs_channel_row_column_and_a_target_row_column_channel() {
    // One patch of each: byte = 100 channel + 10 row + column.
    let byte = |at: usize| (100 * (at % 3) + 10 * (at / 12) + at / 3 % 4) as u8;
    let picture =
        Picture { bytes: (0..48).map(byte).collect(), ..Picture::new(1, [4, 4], 0, 0, false) };
    let mut batch = Batch::new(vec![picture], 2, 2, 1);
    (batch.keep, batch.masked) = (vec![3], vec![1, 0, 2]);
    let [patches, target] = batch.run::<f64>(false);
    let bytes = |numbers: &[f64], channel: fn(usize) -> usize| -> Vec<u8> {
        let unit = |(i, x): (usize, &f64)| {
            let c = channel(i);
            x * STD[c] + MEAN[c]
        };
        numbers.iter().enumerate().map(|at| (255.0 * unit(at)).round() as u8).collect()
    };
    let want = [22, 23, 32, 33, 122, 123, 132, 133, 222, 223, 232, 233];
    assert_eq!(bytes(&patches, |i| i / 4), want);
    let want = [2, 102, 202, 3, 103, 203, 12, 112, 212, 13, 113, 213];
    assert_eq!(bytes(&target[..12], |i| i % 3), want);
}

#[test]
fn crops_inside_and_over_each_edge_are_the_naive_ones() {
    let pictures = vec![
        Picture::new(1, [15, 20], 2, 3, false),
        Picture::new(2, [12, 13], 0, 1, true),
        Picture::new(3, [12, 40], -4, -4, false),
        Picture::new(4, [30, 12], 22, 4, true),
        // As far over as one reflection reaches.
        Picture::new(5, [12, 14], -11, 15, true),
        Picture::new(6, [14, 12], 15, -11, false),
        // Smaller than the crop.
        Picture::new(7, [8, 9], -2, -3, true),
    ];
    for (grid, patch, kept) in [(4, 3, 5), (3, 4, 2), (6, 2, 9), (1, 12, 1), (2, 6, 4)] {
        Batch::new(pictures.clone(), grid, patch, kept).check();
    }
}

#[test]
fn any_crop_that_fits_is_the_naive_one() {
    let sizes = (1usize..=3, 1usize..=4, 2usize..=17, 2usize..=17);
    for_any((sizes, 0.0..1.0, 0.0..1.0, any::<bool>()), |((grid, patch, h, w), v, u, flip)| {
        let side = grid * patch;
        // Offsets from -(extent - 1) to 2 extent - 2 - side reach no further than one reflection.
        let [Some(down), Some(right)] = [h, w].map(|extent| (3 * extent).checked_sub(2 + side))
        else {
            return;
        };
        let top = (v * down as f64) as i64 - (h as i64 - 1);
        let left = (u * right as f64) as i64 - (w as i64 - 1);
        let pictures =
            vec![Picture::new(1, [h, w], top, left, flip), Picture::new(2, [32, 33], 1, 2, !flip)];
        Batch::new(pictures, grid, patch, 1 + grid * grid / 4).check();
    });
}

#[test]
fn all_patches_may_be_kept() {
    let batch = Batch::new(vec![Picture::new(1, [12, 12], 0, 0, false)], 4, 3, 16);
    let [patches, target] = batch.run::<f64>(false);
    close("patches", &patches, &batch.naive(&batch.keep, true), 1e-14);
    assert!(target.is_empty());
}

#[test]
fn threads_change_no_bit() {
    let pictures = (0..37).map(|i| Picture::new(i, [40, 50], 3, 5, i % 2 == 0)).collect();
    let batch = Batch::new(pictures, 4, 8, 4);
    for filtered in [false, true] {
        same_on_any_threads(|| batch.run::<f32>(filtered).concat());
    }
}

/// A crop of 4 x 4 pixels from a picture of 5 x 6, and all that is wrong with others.
const GOOD: [i64; 6] = [0, 5, 6, 1, 2, 0];
const BAD: [[i64; 6]; 14] = [
    [-1, 5, 6, 1, 2, 0],
    [1, 5, 6, 1, 2, 0],
    [0, 0, 6, 1, 2, 0],
    [0, 5, 0, 1, 2, 0],
    [0, -5, -6, 1, 2, 0],
    [0, 5, 6, -5, 2, 0],
    [0, 5, 6, 6, 2, 0],
    [0, 5, 6, 1, -6, 0],
    [0, 5, 6, 1, 8, 0],
    [0, 5, 6, 1, 2, 2],
    [0, 5, 6, 1, 2, -1],
    [0, i64::MAX, i64::MAX, 1, 2, 0],
    [i64::MAX, 5, 6, 1, 2, 0],
    [0, 5, 6, i64::MAX, i64::MIN, 0],
];

#[test]
fn what_does_not_fit_is_refused() {
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let common = || {
        [
            real("patches", &[1, 1, 12]),
            arg("images", DType::U8, &[90]).free(&[0]),
            arg("geometry", DType::I64, &[1, 6]).holding(&GOOD),
            arg("ids_keep", DType::I32, &[1, 1]).holding(&[3]),
        ]
    };
    let ids = || arg("target.ids_masked", DType::I32, &[1, 3]).holding(&[0, 1, 2]);
    let raw: Vec<_> =
        common().into_iter().chain([real("target.target", &[1, 3, 12]), ids()]).collect();
    let pixels = real("target.pixels", &[1, 3, 4, 4]);
    let filtered: Vec<_> = common().into_iter().chain([pixels]).collect();
    let with = |t: &mut [Any], patch_size, mean, std| -> Result<()> {
        let [patches, images, geometry, ids_keep, rest @ ..] = t else { unreachable!() };
        let target = match rest {
            [target, ids] => Target::Raw { target: target.view_mut(), ids_masked: ids.view() },
            [pixels] => Target::Filtered { pixels: pixels.view_mut() },
            _ => unreachable!(),
        };
        let (images, geometry, ids_keep) = (images.view(), geometry.view(), ids_keep.view());
        let patches = patches.view_mut();
        let args = Forward { patches, target, images, geometry, ids_keep, mean, std, patch_size };
        forward(&cpu(), args)
    };
    let with_patch = |t: &mut [Any], patch_size| with(t, patch_size, MEAN, STD);
    let call = |t: &mut [Any]| with_patch(t, 2);
    refuses_numbers("input::forward: mean", &[], &raw, &|t, bad| with(t, 2, [0.5, 0.5, bad], STD));
    refuses_numbers("input::forward: std", &[0.0, -0.5], &raw, &|t, bad| {
        with(t, 2, MEAN, [0.5, bad, 0.5])
    });
    let op = "input::forward";
    for args in [&raw, &filtered] {
        refuses_what_does_not_fit(op, args, &call);
        for bad in BAD {
            let err = refusal(args, &call, "geometry", Any::holding(&bad, &[1, 6]));
            assert!(matches!(err, Error::Invalid { .. }), "{err}");
            let bad: Geometry = bytemuck::cast(bad);
            let want =
                format!("`input::forward: geometry` of image 0 does not fit: {bad:?} in 90 bytes");
            assert_eq!(err.to_string(), want);
        }
        let err = refusal(args, &call, "images", Any::new(DType::U8, &[89]));
        assert!(matches!(err, Error::Invalid { .. }), "{err}");
        for id in [4, -1] {
            let err = refusal(args, &call, "ids_keep", Any::holding(&[id], &[1, 1]));
            let want = format!("`input::forward: ids_keep` holds the id {id}, outside 0..4");
            assert_eq!(err.to_string(), want);
        }
    }
    let err = refusal(&raw, &call, "target.ids_masked", Any::holding(&[0, 1, 4], &[1, 3]));
    let want = "`input::forward: target.ids_masked` holds the id 4, outside 0..4";
    assert_eq!(err.to_string(), want);
    // Patches of no pixels, and a side whose square wraps around to 1.
    let bad = Any::new(DType::F32, &[1, 1, 0]);
    let err = refusal(&raw, &|t| with_patch(t, 0), "patches", bad);
    assert!(matches!(err, Error::Invalid { .. }), "{err}");
    let bad = Any::new(DType::F32, &[1, 1, 3]);
    let err = refusal(&raw, &|t| with_patch(t, usize::MAX), "patches", bad);
    assert!(matches!(err, Error::Invalid { .. }), "{err}");
}

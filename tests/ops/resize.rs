//! Antialiased resampling to the bit: Pillow's values, its formula written out, flips, refusals. `tests/data/resize.rs`
//! holds the same code to more of Pillow's results.

use pixmim::ops::input::Geometry;
use pixmim::ops::resize::Interpolation::{self, Bicubic, Bilinear};
use pixmim::ops::resize::{Forward, forward};
use pixmim::{DType, Error};
use proptest::prelude::any;

use crate::common::{Guarded, cpu, for_any, same_on_any_threads, uniform, view};
use crate::refusal::{Any, arg, refusal, refuses_what_does_not_fit};

/// A rectangle, and whether its crop is mirrored.
#[derive(Clone, Debug)]
struct Picture {
    height: usize,
    width: usize,
    bytes: Vec<u8>,
    flip: bool,
}

impl Picture {
    fn new(seed: u64, [height, width]: [usize; 2], flip: bool) -> Self {
        let numbers: Vec<f64> = uniform(seed, &[height, width, 3]);
        let bytes = numbers.iter().map(|x| (127.5 + 160.0 * x) as u8).collect();
        Self { height, width, bytes, flip }
    }

    /// The crop of `side`, one byte after the other as the formula has it: Pillow's `ImagingResample`.
    fn naive(&self, side: usize, interpolation: Interpolation) -> Vec<u8> {
        let (across, down) =
            (weights(self.width, side, interpolation), weights(self.height, side, interpolation));
        let sum = |window: &[(usize, i64)], byte: &dyn Fn(usize) -> u8| {
            let sum: i64 = window.iter().map(|&(i, weight)| weight * i64::from(byte(i))).sum();
            ((sum + (1 << 21)) >> 22).clamp(0, 255) as u8
        };
        let squeezed = |y: usize, x: usize, c: usize| {
            sum(&across[x], &|i| self.bytes[3 * (y * self.width + i) + c])
        };
        let mut out = vec![];
        for at in 0..3 * side * side {
            let (y, x, c) = (at / 3 / side, at / 3 % side, at % 3);
            let x = if self.flip { side - 1 - x } else { x };
            out.push(sum(&down[y], &|i| squeezed(i, x, c)));
        }
        out
    }
}

/// Of each output the inputs it is made of, with weights in units of 2^-22.
fn weights(inputs: usize, outputs: usize, interpolation: Interpolation) -> Vec<Vec<(usize, i64)>> {
    let scale = inputs as f64 / outputs as f64;
    let stretch = scale.max(1.0);
    let (kernel, reach): (fn(f64) -> f64, f64) = match interpolation {
        // Keys 1981 with a = -1/2.
        Bicubic => (
            |x| match x {
                x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
                x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
                _ => 0.0,
            },
            2.0 * stretch,
        ),
        Bilinear => (|x| (1.0 - x).max(0.0), stretch),
    };
    let window = |output: usize| {
        let centre = (output as f64 + 0.5) * scale;
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let end = (inputs as f64).min((centre + reach + 0.5).trunc()) as usize;
        let exact = |i: usize| kernel(((i as f64 - centre + 0.5) * (1.0 / stretch)).abs());
        let sum: f64 = (first..end).map(exact).sum();
        let fixed = |i| {
            let weight = exact(i) / sum * 4_194_304.0;
            (weight + if weight < 0.0 { -0.5 } else { 0.5 }) as i64
        };
        (first..end).map(|i| (i, fixed(i))).collect()
    };
    (0..outputs).map(window).collect()
}

/// The crops, of pictures that lie a few bytes apart.
fn run(pictures: &[Picture], side: usize, interpolation: Interpolation) -> Vec<u8> {
    let (mut bytes, mut geometry) = (vec![7; 5], vec![]);
    for p in pictures {
        let (offset, flip) = (bytes.len() as i64, i64::from(p.flip));
        geometry.extend([offset, p.height as i64, p.width as i64, 0, 0, flip]);
        bytes.extend(&p.bytes);
    }
    let mut crops = Guarded::poisoned(&[pictures.len(), side, side, 3]);
    let args = Forward {
        crops: crops.view(),
        images: view(&bytes, &[bytes.len()]),
        geometry: view(&geometry, &[pictures.len(), 6]),
        interpolation,
    };
    forward(&cpu(), args).unwrap();
    crops.values()
}

fn check(pictures: &[Picture], side: usize) {
    for interpolation in [Bicubic, Bilinear] {
        let want: Vec<_> = pictures.iter().flat_map(|p| p.naive(side, interpolation)).collect();
        assert!(run(pictures, side, interpolation) == want, "{interpolation:?} to {side}");
    }
}

#[test]
fn a_crop_has_pillows_values_and_a_mirrored_one_has_them_mirrored() {
    let want = [
        [0, 15, 56, 97, 119],
        [10, 29, 70, 111, 133],
        [33, 55, 96, 137, 159],
        [59, 81, 122, 163, 185],
        [73, 95, 136, 177, 199],
    ];
    let bytes: Vec<_> = (0..9).flat_map(|at| [(37 * (at / 3) + 59 * (at % 3)) as u8; 3]).collect();
    let picture = Picture { height: 3, width: 3, bytes, flip: false };
    let mirrored = Picture { flip: true, ..picture.clone() };
    let crops = run(&[picture, mirrored], 5, Bicubic);
    let (pixels, _) = crops.as_chunks::<3>();
    assert!(pixels.iter().all(|[r, g, b]| r == g && g == b));
    let red: Vec<_> = pixels.iter().map(|pixel| pixel[0]).collect();
    assert_eq!(red[..25], want.concat());
    assert_eq!(red[25..], want.map(|row| row.into_iter().rev().collect::<Vec<_>>()).concat());
}

#[test]
fn rectangles_smaller_and_larger_than_the_crop_are_the_naive_ones() {
    let sizes = [[1, 1], [1, 9], [8, 1], [7, 11], [13, 13], [13, 29], [31, 13], [90, 4], [5, 120]];
    let pictures: Vec<_> =
        (0..).zip(sizes).map(|(i, size)| Picture::new(i, size, i % 2 == 0)).collect();
    for side in [1, 2, 13, 18] {
        check(&pictures, side);
    }
}

#[test]
fn any_rectangle_is_the_naive_one() {
    for_any((1usize..=40, 1usize..=40, 1usize..=20, any::<bool>()), |(h, w, side, flip)| {
        check(&[Picture::new(1, [h, w], flip), Picture::new(2, [w, h], !flip)], side);
    });
}

#[test]
fn threads_change_no_bit() {
    let pictures: Vec<_> = (0..37).map(|i| Picture::new(i, [40, 50], i % 2 == 0)).collect();
    same_on_any_threads(|| run(&pictures, 24, Bicubic));
}

/// A rectangle of 5 x 6, and all that is wrong with others.
const GOOD: [i64; 6] = [0, 5, 6, 0, 0, 1];
const BAD: [[i64; 6]; 12] = [
    [-1, 5, 6, 0, 0, 0],
    [1, 5, 6, 0, 0, 0],
    [i64::MAX, 5, 6, 0, 0, 0],
    [0, 0, 6, 0, 0, 0],
    [0, 5, 0, 0, 0, 0],
    [0, -5, -6, 0, 0, 0],
    [0, i64::MAX, i64::MAX, 0, 0, 0],
    [0, 5, 6, 1, 0, 0],
    [0, 5, 6, 0, -1, 0],
    [0, 5, 6, i64::MIN, 0, 0],
    [0, 5, 6, 0, 0, 2],
    [0, 5, 6, 0, 0, -1],
];

#[test]
fn what_does_not_fit_is_refused() {
    let args = [
        arg("crops", DType::U8, &[1, 4, 4, 3]),
        arg("images", DType::U8, &[90]).free(&[0]),
        arg("geometry", DType::I64, &[1, 6]).holding(&GOOD),
    ];
    let call = |t: &mut [Any]| {
        let [crops, images, geometry] = t else { unreachable!() };
        let (images, geometry) = (images.view(), geometry.view());
        let crops = crops.view_mut();
        forward(&cpu(), Forward { crops, images, geometry, interpolation: Bicubic })
    };
    refuses_what_does_not_fit("resize::forward", &args, &call);
    for bad in BAD {
        let err = refusal(&args, &call, "geometry", Any::holding(&bad, &[1, 6]));
        let bad: Geometry = bytemuck::cast(bad);
        let want =
            format!("`resize::forward: geometry` of image 0 does not fit: {bad:?} in 90 bytes");
        assert_eq!(err.to_string(), want);
    }
    let err = refusal(&args, &call, "images", Any::new(DType::U8, &[89]));
    assert!(matches!(err, Error::Invalid { .. }), "{err}");
}

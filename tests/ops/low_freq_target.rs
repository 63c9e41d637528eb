//! `PixMIM`'s target: golden values (the released source's formula in numpy, f64), the formula itself, its symmetries.

use pixmim::ops::low_freq_target::{Filter, Forward, forward, workspace_bytes};
use pixmim::{DType, Error, Result};

use crate::common::{
    Guarded, Real, close, cpu, for_any, masks, normal, same_on_any_threads, scale, uniform, view,
    workspace,
};
use crate::refusal::{
    Any, arg, refusal, refuses_numbers, refuses_what_does_not_fit, workspace_arg,
};

const NO_MEAN: [f64; 3] = [0.0; 3];
const NO_STD: [f64; 3] = [1.0; 3];

/// The patches `ids` of the filtered images, as the op gives them.
fn targets<T: Real>(
    filter: &Filter,
    pixels: &[T],
    patch: usize,
    ids: &[i32],
    [mean, std]: [[f64; 3]; 2],
) -> Vec<T> {
    let side = filter.size();
    let images = pixels.len() / (3 * side * side);
    let masked = ids.len() / images;
    let mut target = Guarded::poisoned(&[images, masked, 3 * patch * patch]);
    let mut work = workspace(workspace_bytes(&cpu(), T::DTYPE, images, filter, true));
    let args = Forward {
        target: target.view(),
        pixels: view(pixels, &[images, 3, side, side]),
        ids_masked: view(ids, &[images, masked]),
        filter,
        mean,
        std,
        patch_size: patch,
        exact: true,
        workspace: work.view(),
    };
    forward(&cpu(), args).unwrap();
    work.values();
    target.values()
}

/// The filtered images, whole: every patch is asked for, in some other order, and put back.
fn filtered<T: Real>(filter: &Filter, pixels: &[T], patch: usize) -> Vec<T> {
    let side = filter.size();
    let (images, grid) = (pixels.len() / (3 * side * side), side / patch);
    let ids = masks(side as u64, images, grid * grid, 0).masked;
    let targets = targets(filter, pixels, patch, &ids, [NO_MEAN, NO_STD]);
    let mut out = vec![T::of(f64::NAN); pixels.len()];
    for (i, &x) in targets.iter().enumerate() {
        let (at, e) = (i / (3 * patch * patch), i % (3 * patch * patch));
        let (image, id) = (at / (grid * grid), ids[at] as usize);
        let (y, x_in, c) = (e / 3 / patch, e / 3 % patch, e % 3);
        let (y, column) = (id / grid * patch + y, id % grid * patch + x_in);
        out[((image * 3 + c) * side + y) * side + column] = x;
    }
    out
}

/// The same channel three times.
fn grey(side: usize, value: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let channel: Vec<f64> = (0..side * side).map(|i| value(i / side, i % side)).collect();
    channel.repeat(3)
}

/// Steps 2 to 6 of the method as the released source takes them: transform, shift, mask, inverse, magnitude.
fn naive(side: usize, radius: f64, pixels: &[f64]) -> Vec<f64> {
    let wave = |turns: i64| {
        let angle = std::f64::consts::TAU * turns.rem_euclid(side as i64) as f64 / side as f64;
        (angle.cos(), angle.sin())
    };
    let centre = (side as f64 - 1.0) / 2.0;
    let mut out = vec![];
    for channel in pixels.chunks(side * side) {
        let mut sums = vec![(0.0, 0.0); side * side];
        for (i, j) in (0..side * side).map(|at| (at / side, at % side)) {
            if (i as f64 - centre).powi(2) + (j as f64 - centre).powi(2) > radius * radius {
                continue;
            }
            // Index 0 of an axis lies at index side / 2 of the shifted spectrum.
            let (u, v) = ((i + side - side / 2) % side, (j + side - side / 2) % side);
            let turns = |at: usize| (u * (at / side) + v * (at % side)) as i64;
            let (mut re, mut im) = (0.0, 0.0);
            for (at, x) in channel.iter().enumerate() {
                let (cos, sin) = wave(-turns(at));
                (re, im) = (re + x * cos, im + x * sin);
            }
            for (at, sum) in sums.iter_mut().enumerate() {
                let (cos, sin) = wave(turns(at));
                *sum = (sum.0 + re * cos - im * sin, sum.1 + re * sin + im * cos);
            }
        }
        out.extend(sums.iter().map(|(re, im)| re.hypot(*im) / (side * side) as f64));
    }
    out
}

#[test]
fn the_disc_keeps_the_bins_of_the_released_mask() {
    for (size, radius, bins) in [
        (224, 40.0, 5024),
        (224, 20.0, 1264),
        (224, 60.0, 11304),
        (448, 40.0, 5024),
        (448, 80.0, 20108),
        (32, 8.0, 208),
        (16, 4.0, 52),
        (8, 2.0, 12),
    ] {
        assert_eq!(Filter::new(&cpu(), size, radius).unwrap().kept_bins(), bins, "{size} {radius}");
    }
}

#[test]
fn a_small_ramp_gives_the_golden_rows() {
    let pixels = grey(8, |i, j| ((7 * i + 13 * j) % 32) as f64 / 31.0);
    let out = filtered(&Filter::new(&cpu(), 8, 2.0).unwrap(), &pixels, 2);
    let first = [
        0.42337384, 0.46778965, 0.49464346, 0.46084107, 0.44771645, 0.49512646, 0.50719404,
        0.45305796,
    ];
    let last = [
        0.4839632, 0.53274681, 0.57788448, 0.54386299, 0.49350006, 0.51713611, 0.54728162,
        0.5139985,
    ];
    close("row 0", &out[..8], &first, 5e-9);
    close("row 7", &out[56..64], &last, 5e-9);
}

#[test]
fn a_large_pattern_gives_the_golden_values_and_statistics() {
    const SIDE: usize = 224;
    let at = |c: usize, i: usize, j: usize| (c * SIDE + i) * SIDE + j;
    let pixels: Vec<f64> = (0..3 * SIDE * SIDE)
        .map(|n| {
            let (c, i, j) = (n / SIDE / SIDE, n / SIDE % SIDE, n % SIDE);
            ((31 * i + 17 * j + 57 * c) % 256) as f64 / 255.0
        })
        .collect();
    let out = filtered(&Filter::new(&cpu(), SIDE, 40.0).unwrap(), &pixels, 16);
    for (i, want) in [
        (at(0, 0, 0), 0.3696986769),
        (at(0, 0, 1), 0.1688178901),
        (at(0, 1, 0), 0.2657536000),
        (at(1, 100, 100), 0.5598192013),
        (at(2, 223, 223), 0.1542758335),
        (at(2, 17, 201), 0.7677544290),
    ] {
        close("pixel", &out[i..=i], &[want], 1e-10);
    }
    let means = [0.500_009_201_613_93, 0.500_029_310_587_45, 0.500_007_905_626_74];
    let deviations = [0.226_834_043_688_71, 0.226_833_766_647_74, 0.226_852_173_984_03];
    for (c, channel) in out.chunks(SIDE * SIDE).enumerate() {
        let n = channel.len() as f64;
        let mean = channel.iter().sum::<f64>() / n;
        let var = channel.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        close("mean and deviation", &[mean, var.sqrt()], &[means[c], deviations[c]], 1e-13);
    }
    let (min, max) = out.iter().fold((1.0f64, 0.0f64), |(a, b), &x| (a.min(x), b.max(x)));
    close("extremes", &[min, max], &[0.062_183_442_317_17, 0.931_606_801_205_02], 1e-13);
}

#[test]
fn at_the_rim_only_the_negative_frequency_is_kept() {
    let turn = std::f64::consts::TAU * 40.0 / 224.0;
    let pixels = grey(224, |_, j| 0.5 + 0.3 * (turn * j as f64).cos());
    let out = filtered(&Filter::new(&cpu(), 224, 40.0).unwrap(), &pixels, 16);
    close("row 0", &out[..4], &[0.65, 0.58101855, 0.42305618, 0.35533198], 5e-9);
    // | 0.5 + 0.15 exp(-i turn j) |
    let want = grey(224, |_, j| {
        let (sin, cos) = (turn * j as f64).sin_cos();
        (0.5 + 0.15 * cos).hypot(0.15 * sin)
    });
    close("image", &out, &want, 5e-15);
}

#[test]
fn what_lies_in_the_band_comes_back_exactly_and_what_does_not_vanishes() {
    let turn = std::f64::consts::TAU / 224.0;
    let low = |i: usize, j: usize| {
        0.5 + 0.2 * (3.0 * turn * i as f64).cos() + 0.1 * (5.0 * turn * j as f64).sin()
    };
    let high = |i: usize, j: usize| 0.1 * (90.0 * turn * (i + 2 * j) as f64).cos();
    let out = filtered(
        &Filter::new(&cpu(), 224, 40.0).unwrap(),
        &grey(224, |i, j| low(i, j) + high(i, j)),
        16,
    );
    close("image", &out, &grey(224, low), 5e-15);
}

#[test]
fn any_size_and_radius_give_the_formula_of_the_source() {
    for_any((1usize..=4, 1usize..=4, 0.75f64..9.0), |(grid, patch, radius)| {
        let side = grid * patch;
        let pixels: Vec<f64> = uniform(side as u64, &[2, 3, side, side]);
        let filter = Filter::new(&cpu(), side, radius).unwrap();
        let out = filtered(&filter, &pixels, patch);
        close("image", &out, &naive(side, radius, &pixels), 1e-13);
    });
}

#[test]
fn a_radius_that_reaches_the_corner_keeps_everything() {
    for side in [6, 9] {
        let radius = (side as f64 - 1.0) / 2f64.sqrt() + 1e-9;
        let filter = Filter::new(&cpu(), side, radius).unwrap();
        assert_eq!(filter.kept_bins(), side * side);
        let pixels: Vec<f64> = uniform(1, &[1, 3, side, side]);
        let want: Vec<f64> = pixels.iter().map(|x| x.abs()).collect();
        close("magnitude", &filtered(&filter, &pixels, 3), &want, 1e-14);
    }
}

#[test]
fn a_constant_image_stays() {
    for (side, radius) in [(16, 4.0), (15, 0.0), (16, 0.75)] {
        let filter = Filter::new(&cpu(), side, radius).unwrap();
        let pixels = vec![0.7; 3 * side * side];
        close("image", &filtered(&filter, &pixels, 1), &pixels, 1e-14);
    }
}

/// Moves the pixels of each channel: (y, x) of the result comes from `from(y, x)`.
fn moved(side: usize, pixels: &[f64], from: impl Fn(usize, usize) -> (usize, usize)) -> Vec<f64> {
    let mut out = vec![];
    for channel in pixels.chunks(side * side) {
        out.extend((0..side * side).map(|at| {
            let (y, x) = from(at / side, at % side);
            channel[y * side + x]
        }));
    }
    out
}

#[test]
fn it_commutes_with_half_turns_transposition_and_shifts_but_not_with_a_mirror() {
    for (side, radius, patch) in [(32, 8.0, 4), (33, 8.0, 3)] {
        let filter = Filter::new(&cpu(), side, radius).unwrap();
        let pixels: Vec<f64> = uniform::<f64>(1, &[1, 3, side, side]);
        let out = filtered(&filter, &pixels, patch);
        let last = side - 1;
        let half_turn = |y, x| (last - y, last - x);
        let shift = |y, x| ((y + 5) % side, (x + 11) % side);
        let moves: [&dyn Fn(usize, usize) -> (usize, usize); 3] =
            [&half_turn, &|y, x| (x, y), &shift];
        for from in moves {
            let got = filtered(&filter, &moved(side, &pixels, from), patch);
            close("moved", &got, &moved(side, &out, from), 1e-14);
        }
        let mirror = |y, x| (y, last - x);
        let got = filtered(&filter, &moved(side, &pixels, mirror), patch);
        let want = moved(side, &out, mirror);
        if side % 2 == 1 {
            close("mirrored, odd size", &got, &want, 1e-14);
        } else {
            // Half a bin off centre, an even size tells left from right: mirror first, then filter.
            let errors: Vec<f64> = got.iter().zip(&want).map(|(g, w)| g - w).collect();
            let square: f64 = errors.iter().map(|e| e * e).sum();
            assert!((square / errors.len() as f64).sqrt() > 1e-3 && scale(&errors) > 1e-2);
        }
    }
}

#[test]
fn filtering_twice_changes_nothing_where_the_disc_is_centred() {
    // At odd sizes; low contrast keeps the filtered image positive, so that the magnitude does nothing.
    let filter = Filter::new(&cpu(), 63, 11.0).unwrap();
    let pixels: Vec<f64> = normal(1, &[1, 3, 63, 63], 0.5, 0.05);
    let once = filtered(&filter, &pixels, 7);
    close("twice", &filtered(&filter, &once, 7), &once, 1e-14);
    let single: Vec<f32> = once.iter().map(|&x| x as f32).collect();
    close("twice in f32", &filtered(&filter, &single, 7), &once, 1e-6);
}

#[test]
fn in_f32_it_is_exact_to_2e_6() {
    let filter = Filter::new(&cpu(), 224, 40.0).unwrap();
    for seed in 1..=3 {
        let shape = [1, 3, 224, 224];
        let unit = |x: f64| ((x + 1.0) / 2.0) as f32;
        let pixels: Vec<f32> = uniform::<f64>(seed, &shape).into_iter().map(unit).collect();
        let wide: Vec<f64> = pixels.iter().map(|x| x.f64()).collect();
        close("f32", &filtered(&filter, &pixels, 16), &filtered(&filter, &wide, 16), 2e-6);
        let spread: Vec<f32> = uniform::<f32>(seed, &shape).iter().map(|x| 3.0 * x).collect();
        let wide: Vec<f64> = spread.iter().map(|x| x.f64()).collect();
        close("f32", &filtered(&filter, &spread, 16), &filtered(&filter, &wide, 16), 2e-6);
    }
}

#[test]
fn only_the_patches_asked_for_come_normalised_row_column_channel() {
    let (side, patch) = (12, 3);
    let filter = Filter::new(&cpu(), side, 3.0).unwrap();
    let pixels: Vec<f64> = uniform(1, &[2, 3, side, side]);
    let whole = filtered(&filter, &pixels, 4);
    let ids = [15, 3, 8, 0, 1, 14];
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let got = targets(&filter, &pixels, patch, &ids, [mean, std]);
    let mut want = vec![];
    for (i, id) in ids.iter().enumerate() {
        for e in 0..27 {
            let (y, x, c) = (id / 4 * 3 + e / 9, id % 4 * 3 + e / 3 % 3, e % 3);
            let at = ((i as i32 / 3 * 3 + c) * 12 + y) * 12 + x;
            let c = c as usize;
            want.push((whole[at as usize] - mean[c]) / std[c]);
        }
    }
    close("target", &got, &want, 1e-13);
}

#[test]
fn each_image_is_by_itself_however_many_there_are() {
    // More images than run at once, and not a multiple of that.
    let filter = Filter::new(&cpu(), 6, 2.0).unwrap();
    let pixels: Vec<f64> = uniform(1, &[71, 3, 6, 6]);
    let all = filtered(&filter, &pixels, 2);
    for (pixels, got) in pixels.chunks(108).zip(all.chunks(108)) {
        close("image", got, &filtered(&filter, pixels, 2), 1e-15);
    }
}

#[test]
fn threads_change_no_bit() {
    let filter = Filter::new(&cpu(), 96, 17.0).unwrap();
    let pixels: Vec<f32> = uniform(1, &[37, 3, 96, 96]);
    same_on_any_threads(|| filtered(&filter, &pixels, 8));
}

#[test]
fn what_does_not_fit_is_refused() {
    for (size, radius) in
        [(8, 0.7), (8, -1.0), (8, f64::NAN), (8, f64::INFINITY), (9, -0.1), (0, 1.0)]
    {
        let err = Filter::new(&cpu(), size, radius).unwrap_err();
        assert!(matches!(&err, Error::Invalid { name, .. } if name == "radius"), "{err}");
    }
    let err = Filter::new(&cpu(), 8, 0.5).unwrap_err();
    let want = "`radius` is 0.5 and keeps no frequency of 8 pixels; PixMIM has 40 at 224";
    assert_eq!(err.to_string(), want);

    let filter = Filter::new(&cpu(), 6, 2.0).unwrap();
    let real = |name, shape: &[usize]| arg(name, DType::F32, shape);
    let args = [
        real("target", &[2, 3, 12]),
        real("pixels", &[2, 3, 6, 6]),
        arg("ids_masked", DType::I32, &[2, 3]).holding(&[0, 8, 4, 2, 3, 1]),
        workspace_arg(workspace_bytes(&cpu(), DType::F32, 2, &filter, true)),
    ];
    let with = |t: &mut [Any], patch_size, mean, std| -> Result<()> {
        let [target, pixels, ids_masked, workspace] = t else { unreachable!() };
        let args = Forward {
            target: target.view_mut(),
            pixels: pixels.view(),
            ids_masked: ids_masked.view(),
            filter: &filter,
            mean,
            std,
            patch_size,
            exact: true,
            workspace: workspace.view_mut(),
        };
        forward(&cpu(), args)
    };
    let with_patch = |patch_size: usize| {
        let with = &with;
        move |t: &mut [Any]| with(t, patch_size, NO_MEAN, NO_STD)
    };
    refuses_numbers("low_freq_target::forward: mean", &[], &args, &|t, bad| {
        with(t, 2, [0.5, 0.5, bad], NO_STD)
    });
    refuses_numbers("low_freq_target::forward: std", &[0.0, -0.5], &args, &|t, bad| {
        with(t, 2, NO_MEAN, [1.0, bad, 1.0])
    });
    let call = with_patch(2);
    refuses_what_does_not_fit("low_freq_target::forward", &args, &call);
    let err = refusal(&args, &call, "pixels", Any::new(DType::F32, &[2, 3, 8, 8]));
    let want = "`low_freq_target: filter` is for 6 pixels; `pixels` has 8, in patches of 2";
    assert_eq!(err.to_string(), want);
    for id in [9, -1] {
        let bad = Any::holding(&[0, 8, 4, 2, id, 1], &[2, 3]);
        let err = refusal(&args, &call, "ids_masked", bad);
        let want =
            format!("`low_freq_target::forward: ids_masked` holds the id {id}, outside 0..9");
        assert_eq!(err.to_string(), want);
    }
    // Patches that do not tile the image, or of no pixels.
    let err = refusal(&args, &with_patch(4), "target", Any::new(DType::F32, &[2, 3, 48]));
    assert!(matches!(err, Error::Invalid { .. }), "{err}");
    let err = refusal(&args, &with_patch(0), "target", Any::new(DType::F32, &[2, 3, 0]));
    assert!(matches!(err, Error::Invalid { .. }), "{err}");
    // A side whose square wraps around to 1.
    let bad = Any::new(DType::F32, &[2, 3, 3]);
    let err = refusal(&args, &with_patch(usize::MAX), "target", bad);
    assert!(matches!(err, Error::Invalid { .. }), "{err}");
}

//! Crops and flips. Goldens of random choices come from a Python transcription of Philox and of the definitions.

use pixmim::data::augment::{
    Geometry, center, choices, random_resized_crop, reflect, shown, simple_crop,
};
use pixmim::data::resize::Rect;
use pixmim::train::config::Interpolation::Bicubic;

use crate::mixed;

#[test]
fn reflection_does_not_repeat_the_edge() {
    let padded: Vec<usize> = (-4..10).map(|i| reflect(i, 6)).collect();
    assert_eq!(padded, [4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2, 1]);
}

#[test]
fn simple_crops_are_the_golden_ones() {
    let crop = simple_crop(&choices(0, 0, 0), (224, 298), 224, 4, 0.5).unwrap();
    assert_eq!(crop, Geometry { offset: 0, height: 224, width: 298, top: -3, left: 78, flip: 0 });
    let crop = simple_crop(&choices(5, 2, 17), (336, 224), 224, 4, 0.5).unwrap();
    assert_eq!(crop, Geometry { offset: 0, height: 336, width: 224, top: 99, left: -1, flip: 0 });
}

#[test]
fn simple_crops_reach_every_place_within_the_padding() {
    let crops: Vec<Geometry> = (0..4000)
        .map(|sample| simple_crop(&choices(1, 2, sample), (16, 21), 16, 3, 0.25).unwrap())
        .collect();
    for top in -3..=3 {
        let count = crops.iter().filter(|crop| crop.top == top).count() as f64;
        assert!((count - 4000.0 / 7.0).abs() < 120.0, "top {top}: {count}");
    }
    for left in -3..=8 {
        let count = crops.iter().filter(|crop| crop.left == left).count() as f64;
        assert!((count - 4000.0 / 12.0).abs() < 100.0, "left {left}: {count}");
    }
    assert!(crops.iter().all(|crop| (-3..=3).contains(&crop.top)));
    assert!(crops.iter().all(|crop| (-3..=8).contains(&crop.left)));
    let flips = crops.iter().filter(|crop| crop.flip == 1).count() as f64;
    assert!((flips - 1000.0).abs() < 150.0, "{flips}");
    let epoch = |e| simple_crop(&choices(1, e, 0), (16, 99), 16, 3, 0.5).unwrap();
    assert!((1..9).any(|e| epoch(e) != epoch(0)));
}

#[test]
fn flips_of_probability_zero_and_one_are_certain() {
    for sample in 0..50 {
        let flip = |p| simple_crop(&choices(1, 2, sample), (16, 21), 16, 3, p).unwrap().flip;
        assert_eq!((flip(0.0), flip(1.0)), (0, 1));
    }
}

#[test]
fn a_border_that_reflection_cannot_fill_is_refused() {
    let crop = |padding| simple_crop(&choices(0, 0, 0), (32, 40), 32, padding, 0.5);
    assert!(crop(31).is_ok());
    assert_eq!(
        crop(32).unwrap_err().to_string(),
        "`method.padding` is 32, but an image of 32 pixels can be reflected by at most 31"
    );
    assert!(simple_crop(&choices(0, 0, 0), (31, 40), 32, 4, 0.5).is_err());
}

/// Every crop that one reflection reaches, of images smaller and larger than it, with different rows and columns.
#[test]
fn a_crop_of_the_part_that_it_shows_is_the_same_crop() {
    for (side, height) in [(7, 4), (7, 7), (7, 12), (8, 31), (1, 1), (1, 3)] {
        let width = height + 2;
        let starts = |extent: i64| 1 - extent..2 * extent - side;
        for top in starts(height) {
            // Rows and columns do not touch each other: all of one, each with one of the other.
            let left =
                starts(width).start + (top - starts(height).start) % starts(width).count() as i64;
            let crop = Geometry { offset: 99, height, width, top, left, flip: top & 1 };
            let (part, place) = shown(&crop, side as usize);
            assert_eq!((place.offset, place.flip), (0, crop.flip));
            assert_eq!((place.height, place.width), (part.height as i64, part.width as i64));
            for (start, extent, first, count, begin) in [
                (top, height, part.top, part.height, place.top),
                (left, width, part.left, part.width, place.left),
            ] {
                let all: Vec<usize> =
                    (start..start + side).map(|i| reflect(i, extent as usize)).collect();
                let inside: Vec<usize> =
                    (begin..begin + side).map(|i| first + reflect(i, count)).collect();
                assert_eq!(inside, all, "{crop:?}");
                assert!(first + count <= extent as usize);
                // Some of it lies in the image: then no more than the crop has.
                if start + side > 0 && start < extent {
                    assert!(count <= side as usize, "{crop:?} shows {count}");
                }
            }
        }
    }
}

#[test]
fn a_crop_within_the_image_shows_its_own_pixels_only() {
    let crop = Geometry { offset: 7, height: 30, width: 40, top: 11, left: 25, flip: 1 };
    let (part, place) = shown(&crop, 9);
    assert_eq!(part, Rect { top: 11, left: 25, height: 9, width: 9 });
    assert_eq!(place, Geometry { offset: 0, height: 9, width: 9, top: 0, left: 0, flip: 1 });
}

#[test]
fn random_resized_crops_are_the_golden_ones() {
    let crop = random_resized_crop(&choices(0, 0, 0), (375, 500), [0.2, 1.0], 0.5);
    assert_eq!(crop, (Rect { top: 142, left: 81, height: 220, width: 292 }, false));
    // The third try: the first two do not fit.
    let crop = random_resized_crop(&choices(5, 2, 17), (500, 333), [0.2, 1.0], 0.5);
    assert_eq!(crop, (Rect { top: 209, left: 0, height: 171, width: 217 }, true));
}

#[test]
fn random_resized_crops_have_the_asked_area_and_aspect() {
    let (height, width) = (480, 500);
    let mut shares = 0.0;
    for sample in 0..2000 {
        let (rect, _) =
            random_resized_crop(&choices(3, 0, sample), (height, width), [0.2, 0.6], 0.5);
        assert!(rect.top + rect.height <= height && rect.left + rect.width <= width);
        let share = (rect.height * rect.width) as f64 / (height * width) as f64;
        let aspect = rect.width as f64 / rect.height as f64;
        assert!((0.198..=0.602).contains(&share), "{share}");
        assert!((0.745..=1.34).contains(&aspect), "{aspect}");
        shares += share;
    }
    assert!((shares / 2000.0 - 0.4).abs() < 0.01, "{shares}");
}

/// With all of the area asked for, nothing fits into a strip.
#[test]
fn random_resized_crops_of_strips_fall_back_to_the_centre() {
    let crop = |size| random_resized_crop(&choices(0, 0, 0), size, [1.0, 1.0], 0.0).0;
    assert_eq!(crop((10, 100)), Rect { top: 0, left: 43, height: 10, width: 13 });
    assert_eq!(crop((100, 10)), Rect { top: 43, left: 0, height: 13, width: 10 });
}

#[test]
fn the_centre_is_cut_as_torchvision_does() {
    let (image, crop) = center(&mixed(1, 375, 500), 224, Bicubic);
    assert_eq!((image.height, image.width), (224, 298));
    assert_eq!(crop, Geometry { offset: 0, height: 224, width: 298, top: 0, left: 37, flip: 0 });
    // Margins of 75 and 73 pixels: half a pixel is rounded to even.
    assert_eq!(center(&mixed(1, 299, 224), 224, Bicubic).1.top, 38);
    assert_eq!(center(&mixed(1, 297, 224), 224, Bicubic).1.top, 36);
}

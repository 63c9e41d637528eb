//! Packed shards: what is written is what is read, and no damage goes unnoticed or is believed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};

use pixmim::data::decode::Options;
use pixmim::data::loader::{Batch, Loader, LoaderConfig, Resample};
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::data::shard::{Set, Shard, ShardWriter};
use pixmim::data::source::{BadImage, Source};
use pixmim::data::{Image, shard};
use pixmim::rng::philox4x32_10;
use pixmim::train::config::{Crop, Interpolation};
use proptest::prelude::*;
use tempfile::{TempDir, tempdir};

use crate::{fixture_path, mixed, write_png};

fn set(shards: u32) -> Set {
    Set {
        shards,
        side: 0,
        interpolation: Interpolation::Bilinear,
        fingerprint: 0x1234_5678,
        classes: vec!["cat".into(), "hünd".into()],
    }
}

fn bad(sample: usize) -> BadImage {
    BadImage { sample, name: format!("cat/{sample}.jpg"), reason: "truncated JPEG".into() }
}

/// A shard of three images of different sizes and one that could not be read.
fn write(folder: &Path, number: u32, shards: u32) -> PathBuf {
    let path = folder.join(format!("images-{number:05}-of-{shards:05}.shard"));
    let first = 4 * number as usize;
    let mut writer = ShardWriter::create(&path, set(shards), number, first as u64).unwrap();
    writer.push("cat/ä.jpg", Some(1), &mixed(first, 5, 7)).unwrap();
    writer.push("x.png", None, &mixed(first + 1, 8, 8)).unwrap();
    writer.skip(bad(first + 2));
    writer.push("cat/3.png", Some(0), &mixed(first + 3, 3, 1)).unwrap();
    writer.finish().unwrap();
    path
}

fn open(path: &Path) -> Source {
    Source::open(path, &Options::default()).unwrap()
}

fn refusal(path: &Path) -> String {
    Source::open(path, &Options::default()).unwrap_err().to_string()
}

/// Whether opening the shard, or reading one of its images, tells of damage.
fn is_found_damaged(path: &Path) -> bool {
    match Shard::open(path) {
        Err(error) => {
            assert_eq!(error.exit_code(), 5, "{error}");
            assert!(error.to_string().contains("run pack_dataset as before"), "{error}");
            true
        }
        Ok(shard) => (0..shard.len()).any(|image| shard.read(image).is_err()),
    }
}

#[test]
fn a_set_gives_the_images_names_and_labels_that_were_written() {
    let root = tempdir().unwrap();
    for number in 0..3 {
        write(root.path(), number, 3);
    }
    let source = open(root.path());
    assert_eq!(source.len(), 9);
    assert!(source.in_memory());
    assert_eq!(source.classes(), ["cat", "hünd"]);
    for sample in 0..9 {
        let (packed, height, width) = [(0, 5, 7), (1, 8, 8), (3, 3, 1)][sample % 3];
        let image = mixed(4 * (sample / 3) + packed, height, width);
        assert_eq!(source.read(sample).unwrap(), image, "{sample}");
    }
    let names: Vec<_> = (3..6).map(|sample| source.name(sample)).collect();
    assert_eq!(names, ["cat/ä.jpg", "x.png", "cat/3.png"]);
    let labels: Vec<_> = (3..6).map(|sample| source.label(sample)).collect();
    assert_eq!(labels, [Some(1), None, Some(0)]);

    let shard = Shard::open(&root.path().join("images-00001-of-00003.shard")).unwrap();
    assert_eq!(*shard.set(), set(3));
    assert_eq!((shard.number(), shard.samples()), (1, 4..8));
    assert_eq!(shard.skipped(), [bad(6)]);
}

/// Laid out by hand after docs/data.md.
#[test]
fn a_file_has_the_bytes_that_the_format_says() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.shard");
    let mut writer =
        ShardWriter::create(&path, Set { side: 2, ..set(9) }, 7, 0x1_0000_0005).unwrap();
    writer.push("é", Some(1), &mixed(3, 2, 4)).unwrap();
    writer.skip(BadImage { sample: 0x1_0000_0006, name: "b".into(), reason: "why".into() });
    writer.finish().unwrap();

    let pixels = [&mixed(3, 2, 4).pixels[..], &[0; 40]].concat();
    let u32s = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
    let index = [
        &128u64.to_le_bytes()[..],
        &u32s(&[2, 4, 1, crc32c::crc32c(&pixels)]),
        &u32s(&[2]),
        "é".as_bytes(),
        &u32s(&[3]),
        b"cat",
        &u32s(&[5]),
        "hünd".as_bytes(),
        &0x1_0000_0006u64.to_le_bytes(),
        &u32s(&[1]),
        b"b",
        &u32s(&[3]),
        b"why",
    ]
    .concat();
    let mut file = [
        &b"pixshard"[..],
        &u32s(&[1, 2, 1, 9, 7, 0x1234_5678, 5, 1]),
        &192u64.to_le_bytes(),
        &(index.len() as u64).to_le_bytes(),
        &u32s(&[1, 1, 2, crc32c::crc32c(&index)]),
        &[0; 52],
    ]
    .concat();
    file.extend(crc32c::crc32c(&file).to_le_bytes());
    assert_eq!(file.len(), 128);
    assert!(fs::read(&path).unwrap() == [file, pixels, index].concat());
}

#[test]
fn pixels_are_views_of_the_mapping_that_begin_on_cache_lines() {
    let root = tempdir().unwrap();
    let shard = Shard::open(&write(root.path(), 0, 1)).unwrap();
    let start = |image: usize| shard.read(image).unwrap().pixels.as_ptr() as usize;
    assert!((0..3).all(|image| start(image).is_multiple_of(64)));
    assert_eq!(start(0), start(0), "nothing was copied");
    assert_eq!(start(1) - start(0), 128, "105 bytes and their zeros");
    let image = shard.read(2).unwrap();
    drop(shard);
    assert_eq!(image, mixed(3, 3, 1), "an image keeps the mapping");
}

#[test]
fn each_byte_of_a_shard_is_under_a_checksum() {
    let root = tempdir().unwrap();
    let path = write(root.path(), 0, 1);
    assert!(!is_found_damaged(&path));
    let whole = fs::read(&path).unwrap();
    let damaged = root.path().join("damaged");
    assert!(whole.len() >= 500);
    for change in 0..2 * whole.len() {
        let mut bytes = whole.clone();
        let at = change % whole.len();
        bytes[at] ^= 1 + (philox4x32_10([change as u32, 0, 0, 0], [5, 0])[0] % 255) as u8;
        fs::write(&damaged, &bytes).unwrap();
        assert!(is_found_damaged(&damaged), "byte {at} of {}", whole.len());
    }
}

#[test]
fn a_shard_of_any_other_length_is_refused() {
    let root = tempdir().unwrap();
    let path = write(root.path(), 0, 1);
    let whole = fs::read(&path).unwrap();
    let other = root.path().join("other");
    for length in 0..whole.len() {
        fs::write(&other, &whole[..length]).unwrap();
        let error = Shard::open(&other).unwrap_err().to_string();
        let says = if length < 128 { "within its header" } else { "should have" };
        assert!(error.contains(says), "{length}: {error}");
    }
    fs::write(&other, [&whole[..], &[0]].concat()).unwrap();
    assert!(Shard::open(&other).is_err());
}

/// Changes the header or the index of a shard, and makes the checksums right again.
fn forged(whole: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    let index_offset = u64::from_le_bytes(whole[40..48].try_into().unwrap()) as usize;
    change(&mut bytes);
    let index_crc = crc32c::crc32c(&bytes[index_offset..]);
    bytes[68..72].copy_from_slice(&index_crc.to_le_bytes());
    let header_crc = crc32c::crc32c(&bytes[..124]);
    bytes[124..128].copy_from_slice(&header_crc.to_le_bytes());
    bytes
}

#[test]
fn a_hostile_header_or_index_is_refused_whatever_its_checksums_say() {
    let root = tempdir().unwrap();
    let whole = fs::read(write(root.path(), 0, 1)).unwrap();
    let index = u64::from_le_bytes(whole[40..48].try_into().unwrap()) as usize;
    let path = root.path().join("forged");
    let refused = |name: &str, at: usize, with: &[u8]| {
        let bytes = forged(&whole, |bytes| bytes[at..at + with.len()].copy_from_slice(with));
        fs::write(&path, bytes).unwrap();
        let error = Shard::open(&path).expect_err(name).to_string();
        assert!(error.contains(name), "{name}: {error}");
    };
    let (u32_max, u64_max) = (u32::MAX.to_le_bytes(), u64::MAX.to_le_bytes());
    refused("does not begin as a shard", 0, b"P");
    refused("version 2", 8, &[2]);
    refused("interpolation is 2", 16, &[2]);
    refused("number 0 of 0", 20, &[0]);
    refused("number 1 of 1", 24, &[1]);
    refused("should have more", 40, &u64_max);
    refused("should have", 48, &u64_max[..7]);
    refused("may have 1048576", 56, &u32_max);
    refused("ends too early", 56, &(1u32 << 20).to_le_bytes());
    refused("its images end at", 56, &[2]);
    refused("may have 1048576", 60, &u32_max);
    refused("may have 1048576", 64, &u32_max);
    refused("ends too early", 60, &(1u32 << 20).to_le_bytes());
    refused("ends too early", 64, &(1u32 << 20).to_le_bytes());
    refused("bytes too many", 60, &[0]);
    // The first image: offset, height, width, label.
    refused("image 0 is at", index, &u64_max);
    refused("image 0 is at 0", index, &[0; 8]);
    refused("image 0 has 7 x 0 pixels", index + 8, &[0]);
    refused("image 0 has 0 x 5 pixels", index + 12, &[0]);
    refused("image 0 has 4294967295 x 4294967295 pixels", index + 8, &[0xFF; 8]);
    refused("image 1 is at 256, should be at 320", index + 8, &[9]);
    refused("image 0 has 7 x 90 pixels", index + 8, &[90]);
    refused("image 0 has label 2 of 2", index + 16, &[2]);
    // The second image's place follows from the first one's size.
    refused("image 1 is at", index, &{
        let mut record = whole[index..index + 24].to_vec();
        record[8] = 2;
        record
    });
    // The first name: length, bytes.
    let names = index + 3 * 24;
    refused("ends too early", names, &u32_max);
    refused("UTF-8", names + 4, &[0xFF]);
    // An image 101 times as long as wide, which would resize to any size.
    let mut long = ShardWriter::create(&path, set(1), 0, 0).unwrap();
    let why = long.push("x", None, &mixed(0, 1, 101)).unwrap_err().to_string();
    assert!(why.contains("`image x` has 303 bytes for 101 x 1"), "{why}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]
    #[test]
    fn no_forged_shard_makes_us_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_header in any::<bool>(),
    ) {
        static WHOLE: LazyLock<Vec<u8>> =
            LazyLock::new(|| fs::read(write(tempdir().unwrap().path(), 0, 1)).unwrap());
        let (root, whole) = (tempdir().unwrap(), &*WHOLE);
        let index = u64::from_le_bytes(whole[40..48].try_into().unwrap()) as usize;
        let range = if in_header { 8..72 } else { index..whole.len() };
        let bytes = forged(whole, |bytes| {
            for (at, value) in &changes {
                bytes[range.start + at.index(range.len())] = *value;
            }
        });
        let path = root.path().join("forged");
        fs::write(&path, bytes).unwrap();
        if let Ok(shard) = Shard::open(&path) {
            for image in 0..shard.len() {
                let _ = (shard.name(image), shard.label(image), shard.read(image));
            }
        }
    }
}

#[test]
fn a_shard_that_is_truncated_while_it_is_mapped_gives_bad_images_and_no_signal() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.shard");
    let mut writer = ShardWriter::create(&path, set(1), 0, 0).unwrap();
    for i in 0..3 {
        writer.push(&format!("{i}"), None, &mixed(i, 64, 64)).unwrap();
    }
    writer.finish().unwrap();
    let source = open(root.path());
    // Pages beyond the new end are gone: touching them would be SIGBUS.
    fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    for sample in 0..3 {
        let bad = source.read(sample).unwrap_err();
        assert_eq!((bad.sample, bad.name), (sample, sample.to_string()));
        assert!(bad.reason.starts_with("a.shard was truncated to 4096 bytes"), "{}", bad.reason);
    }
}

#[test]
fn a_set_that_is_not_whole_is_refused_by_name() {
    let root = tempdir().unwrap();
    let paths: Vec<_> = (0..3).map(|number| write(root.path(), number, 3)).collect();
    let aside = root.path().join("aside");
    for (missing, path) in paths.iter().enumerate() {
        fs::rename(path, &aside).unwrap();
        let why = refusal(root.path());
        assert!(why.contains(&format!("lacks shard {missing} of 3")), "{why}");
        assert!(why.contains("packs only what is missing"), "{why}");
        fs::rename(&aside, path).unwrap();
    }
    let other = tempdir().unwrap();
    fs::copy(write(other.path(), 1, 4), root.path().join("other.shard")).unwrap();
    let why = refusal(root.path());
    assert!(why.contains("two sets") && why.contains("other.shard"), "{why}");
    fs::remove_file(root.path().join("other.shard")).unwrap();

    fs::copy(&paths[1], &paths[2]).unwrap();
    assert!(refusal(root.path()).contains("lacks shard 2 of 3"));
    let path = &paths[2];
    let mut writer = ShardWriter::create(path, set(3), 2, 9).unwrap();
    writer.push("x", None, &mixed(0, 3, 3)).unwrap();
    writer.finish().unwrap();
    let why = refusal(root.path());
    assert!(why.contains("begins with sample 9, the shard before it ends with 8"), "{why}");
}

#[test]
fn shards_without_images_are_passed_over_and_a_set_of_none_is_refused() {
    let root = tempdir().unwrap();
    let path = |number: u32| root.path().join(format!("{number}.shard"));
    for number in 0..4 {
        ShardWriter::create(&path(number), set(4), number, 0).unwrap().finish().unwrap();
    }
    assert!(refusal(root.path()).contains("shards without images"));
    for number in [1, 2] {
        let first = u64::from(number == 2);
        let mut writer = ShardWriter::create(&path(number), set(4), number, first).unwrap();
        writer.push(&number.to_string(), None, &mixed(0, 3, 3)).unwrap();
        writer.finish().unwrap();
    }
    ShardWriter::create(&path(3), set(4), 3, 2).unwrap().finish().unwrap();
    let source = open(root.path());
    assert_eq!((0..source.len()).map(|i| source.name(i)).collect::<Vec<_>>(), ["1", "2"]);
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing_and_one_that_cannot_write_says_where() {
    let root = tempdir().unwrap();
    let mut writer = ShardWriter::create(&root.path().join("a.shard"), set(1), 0, 0).unwrap();
    writer.push("x", Some(0), &mixed(0, 9, 9)).unwrap();
    assert!(root.path().join("a.shard.tmp").is_file());
    let why = writer.push("y", Some(2), &mixed(0, 9, 9)).unwrap_err().to_string();
    assert!(why.contains("`image y` has a label beyond the 2 classes"), "{why}");
    let short = Image { pixels: mixed(0, 9, 8).pixels, ..mixed(0, 9, 9) };
    assert!(writer.push("y", None, &short).is_err());
    drop(writer);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    let error = ShardWriter::create(&root.path().join("no/a.shard"), set(1), 0, 0).unwrap_err();
    assert_eq!(error.exit_code(), 5);
    assert!(error.to_string().contains("no/a.shard.tmp"), "{error}");
}

/// Packs a source as `pack_dataset --side` does.
fn pack(source: &Source, side: usize, folder: &Path) {
    let set = Set {
        shards: 1,
        side: side as u32,
        interpolation: Interpolation::Bicubic,
        fingerprint: source.fingerprint(),
        classes: source.classes().to_vec(),
    };
    let path = folder.join(format!("a.{}", shard::EXTENSION));
    let mut writer = ShardWriter::create(&path, set, 0, 0).unwrap();
    for sample in 0..source.len() {
        let image = source.read(sample).unwrap();
        let size = short_side(image.height, image.width, side);
        let image = resize(&image, Rect::whole(&image), size, Interpolation::Bicubic);
        writer.push(&source.name(sample), source.label(sample), &image).unwrap();
    }
    writer.finish().unwrap();
}

fn batches(source: Source) -> Vec<Batch> {
    let config = LoaderConfig {
        image_size: 16,
        crop: Crop::Simple,
        padding: 3,
        crop_scale: [0.2, 1.0],
        interpolation: Interpolation::Bicubic,
        flip: 0.5,
        seed: 7,
        global_batch: 6,
        micro_batch: 3,
        threads: 2,
        prefetch: 3,
        cache_bytes: 0,
        max_bad_share: 0.0,
        resample: Resample::OnHost,
    };
    let mut loader = Loader::new(Arc::new(source), config, 0).unwrap();
    let never = AtomicBool::new(false);
    (0..12).map(|_| loader.next(&never).unwrap().unwrap()).collect()
}

/// A folder of photos and odd pictures, larger and smaller than the crop.
fn pictures() -> TempDir {
    let root = tempdir().unwrap();
    fs::copy(fixture_path("colour.jpg"), root.path().join("a.jpg")).unwrap();
    fs::copy(fixture_path("lossy.webp"), root.path().join("b.webp")).unwrap();
    for i in 0..11 {
        let path = root.path().join(format!("class_{}/{i}.png", i % 3));
        write_png(&path, &mixed(i, 13 + i % 5, 31 - i % 7));
    }
    root
}

#[test]
fn training_from_shards_sees_the_batches_that_the_photos_give() {
    let (photos, packed) = (pictures(), tempdir().unwrap());
    pack(&open(photos.path()), 16, packed.path());
    let (from_photos, from_shards) = (open(photos.path()), open(packed.path()));
    assert_eq!(from_photos.classes(), from_shards.classes());
    for sample in 0..from_photos.len() {
        assert_eq!(from_photos.name(sample), from_shards.name(sample));
        assert_eq!(from_photos.label(sample), from_shards.label(sample));
    }
    assert!(batches(from_photos) == batches(from_shards));
}

#[test]
fn a_damaged_image_is_skipped_by_the_loader_and_named_with_its_shard() {
    let (photos, packed) = (pictures(), tempdir().unwrap());
    pack(&open(photos.path()), 16, packed.path());
    let path = packed.path().join("a.shard");
    let mut bytes = fs::read(&path).unwrap();
    bytes[128] ^= 1;
    fs::write(&path, bytes).unwrap();
    let bad: Vec<_> = batches(open(packed.path())).into_iter().flat_map(|b| b.bad).collect();
    assert_eq!(bad.len(), 1);
    assert_eq!((bad[0].sample, bad[0].name.as_str()), (0, "a.jpg"));
    assert!(bad[0].reason.starts_with("a.shard is damaged: pixels"), "{}", bad[0].reason);
}

#[test]
fn a_fingerprint_tells_names_labels_and_sizes_but_not_places() {
    let photos = pictures();
    let fingerprint = || open(photos.path()).fingerprint();
    let before = fingerprint();
    let elsewhere = pictures();
    assert_eq!(open(elsewhere.path()).fingerprint(), before);
    fs::rename(photos.path().join("a.jpg"), photos.path().join("c.jpg")).unwrap();
    assert_ne!(fingerprint(), before);
    fs::rename(photos.path().join("c.jpg"), photos.path().join("a.jpg")).unwrap();
    assert_eq!(fingerprint(), before);
    fs::write(photos.path().join("a.jpg"), "other").unwrap();
    assert_ne!(fingerprint(), before);
}

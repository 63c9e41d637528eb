//! Event files, read back by a decoder that shares nothing with the writer.

use std::fs;
use std::path::Path;

use pixmim::train::tensorboard::EventFile;

/// CRC-32C (Castagnoli), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), step))
}

fn masked(bytes: &[u8]) -> u32 {
    let crc = crc32c(bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[derive(Clone, Debug, PartialEq)]
enum Value {
    Varint(u64),
    Bits64([u8; 8]),
    Bytes(Vec<u8>),
    Bits32([u8; 4]),
}

/// The fields of a protocol-buffer message, in order.
fn fields(mut message: &[u8]) -> Vec<(u64, Value)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in 0.. {
            let (&byte, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << (7 * shift);
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(count);
        *bytes = rest;
        taken
    }
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let value = match key & 7 {
            0 => Value::Varint(varint(&mut message)),
            1 => Value::Bits64(take(&mut message, 8).try_into().unwrap()),
            2 => {
                let length = varint(&mut message) as usize;
                Value::Bytes(take(&mut message, length).to_vec())
            }
            5 => Value::Bits32(take(&mut message, 4).try_into().unwrap()),
            wire => panic!("wire type {wire}"),
        };
        fields.push((key >> 3, value));
    }
    fields
}

/// The events of a file, each as its fields without the wall time; checks the framing.
fn events(path: &Path) -> Vec<Vec<(u64, Value)>> {
    let file = fs::read(path).unwrap();
    let mut rest = &file[..];
    let mut events = Vec::new();
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(word(8), masked(&rest[..8]));
        let event = &rest[12..12 + length];
        assert_eq!(word(12 + length), masked(event));
        let mut event = fields(event);
        let (1, Value::Bits64(time)) = event.remove(0) else { panic!("no wall time") };
        assert!((1.6e9..1e11).contains(&f64::from_le_bytes(time)), "seconds since 1970");
        events.push(event);
        rest = &rest[16 + length..];
    }
    events
}

fn bytes(of: &[(u64, Value)], field: u64) -> Vec<u8> {
    match of.iter().find(|(number, _)| *number == field) {
        Some((_, Value::Bytes(bytes))) => bytes.clone(),
        other => panic!("field {field} is {other:?}"),
    }
}

#[test]
fn the_tests_own_checksum_is_castagnolis() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn versions_scalars_and_images_are_read_back_by_an_independent_decoder() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = EventFile::create(dir.path(), None).unwrap();
    file.scalars(300, &[("train/loss", 0.1), ("train/lr", f64::NAN)]).unwrap();
    let png: Vec<u8> = (0..=255).cycle().take(1000).collect();
    file.image(70_000, "viz", 640, 300, &png).unwrap();
    file.sync().unwrap();

    let name = file.path().file_name().unwrap().to_str().unwrap();
    let mut parts = name.strip_prefix("events.out.tfevents.").unwrap().splitn(2, '.');
    assert!(parts.next().unwrap().parse::<u64>().unwrap() > 1_600_000_000);
    assert!(!parts.next().unwrap().is_empty());

    let events = events(file.path());
    assert_eq!(events.len(), 3);
    assert_eq!(events[0], [(2, Value::Varint(0)), (3, Value::Bytes(b"brain.Event:2".to_vec()))]);

    assert_eq!(events[1][0], (2, Value::Varint(300)));
    let values = fields(&bytes(&events[1], 5));
    assert_eq!(values.len(), 2);
    let loss = fields(&bytes(&values[..1], 1));
    assert_eq!(
        loss,
        [(1, Value::Bytes(b"train/loss".to_vec())), (2, Value::Bits32(0.1_f32.to_le_bytes()))]
    );
    let (2, Value::Bits32(lr)) = fields(&bytes(&values[1..], 1))[1] else { panic!("no value") };
    assert!(f32::from_le_bytes(lr).is_nan());

    assert_eq!(events[2][0], (2, Value::Varint(70_000)));
    let value = fields(&bytes(&fields(&bytes(&events[2], 5)), 1));
    assert_eq!(bytes(&value, 1), b"viz");
    assert_eq!(
        fields(&bytes(&value, 4)),
        [
            (1, Value::Varint(300)),
            (2, Value::Varint(640)),
            (3, Value::Varint(3)),
            (4, Value::Bytes(png))
        ]
    );
}

#[test]
fn a_resumed_run_has_a_file_of_its_own_that_discards_the_abandoned_steps() {
    let dir = tempfile::tempdir().unwrap();
    let first = EventFile::create(dir.path(), None).unwrap();
    let second = EventFile::create(dir.path(), Some(41)).unwrap();
    assert_ne!(first.path(), second.path());
    assert!(first.path() < second.path(), "viewers read files in the order of their names");
    let events = events(second.path());
    // SessionLog { status: START }, at the first step that is computed again.
    assert_eq!(events[1], [(2, Value::Varint(42)), (7, Value::Bytes(vec![8, 1]))]);
}

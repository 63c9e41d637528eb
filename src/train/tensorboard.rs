//! TensorBoard event files.
//!
//! A file is a sequence of records: length (u64), masked CRC-32C of the length, bytes, masked CRC-32C of the bytes,
//! all little endian. The bytes are an `Event` message in protocol-buffer wire format; the field numbers are those of
//! `tensorboard/compat/proto/{event,summary}.proto`, named where they are written.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::train::files::Appender;
use crate::{Error, Result};

/// An event file that is being written. Each event is one write, so a viewer can follow a running training.
#[derive(Debug)]
pub struct EventFile {
    file: Appender,
}

impl EventFile {
    /// Starts a new file `events.out.tfevents.<seconds>.<host>` in `dir`, beside those of earlier calls. With
    /// `resumed_step`, TensorBoard drops what older files hold for later steps.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path, resumed_step: Option<u64>) -> Result<Self> {
        let name = format!("events.out.tfevents.{}.{}", now().as_secs(), host());
        let mut path = dir.join(&name);
        let mut taken = 0;
        let file = loop {
            match Appender::create_new(path.clone()) {
                Ok(file) => break file,
                // Two runs started in one second.
                Err(error) if error.kind() == ErrorKind::AlreadyExists && taken < 1000 => {
                    taken += 1;
                    path = dir.join(format!("{name}.{taken}"));
                }
                Err(error) => return Err(Error::io("create", path)(error)),
            }
        };
        let mut events = Self { file };
        // Event.file_version = 3
        events.append(0, |event| put_bytes(event, 3, b"brain.Event:2"))?;
        if let Some(step) = resumed_step {
            // Event.session_log = 7 { SessionLog.status = 1: START = 1 }: discard what is at this step or later.
            events.append(step + 1, |event| put_bytes(event, 7, &[1 << 3, 1]))?;
        }
        Ok(events)
    }

    /// Adds one point to each of the named curves. A slash in a name groups curves: `train/loss`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes()); // Summary.Value.tag
            put_key(&mut entry, 2, WIRE_32_BIT); // Summary.Value.simple_value
            entry.extend((*value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &entry); // Summary.value
        }
        self.append(step, |event| put_bytes(event, 5, &summary)) // Event.summary
    }

    /// Adds the RGB image `png`, of `width` by `height` pixels, under the name `tag`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn image(
        &mut self,
        step: u64,
        tag: &str,
        width: usize,
        height: usize,
        png: &[u8],
    ) -> Result<()> {
        let mut image = Vec::with_capacity(png.len() + 32);
        put_varint(&mut image, 1, height as u64); // Summary.Image.height
        put_varint(&mut image, 2, width as u64); // Summary.Image.width
        put_varint(&mut image, 3, 3); // Summary.Image.colorspace: RGB
        put_bytes(&mut image, 4, png); // Summary.Image.encoded_image_string
        let mut entry = Vec::with_capacity(image.len() + 32);
        put_bytes(&mut entry, 1, tag.as_bytes()); // Summary.Value.tag
        put_bytes(&mut entry, 4, &image); // Summary.Value.image
        let mut summary = Vec::with_capacity(entry.len() + 8);
        put_bytes(&mut summary, 1, &entry); // Summary.value
        self.append(step, |event| put_bytes(event, 5, &summary)) // Event.summary
    }

    /// Waits until all events are on the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync()
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    fn append(&mut self, step: u64, put_what: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut event = Vec::new();
        put_key(&mut event, 1, WIRE_64_BIT); // Event.wall_time
        event.extend(now().as_secs_f64().to_le_bytes());
        put_varint(&mut event, 2, step); // Event.step
        put_what(&mut event);

        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked_crc(&event).to_le_bytes());
        self.file.append(&record)
    }
}

const WIRE_VARINT: u64 = 0;
const WIRE_64_BIT: u64 = 1;
const WIRE_BYTES: u64 = 2;
const WIRE_32_BIT: u64 = 5;

fn put_raw_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn put_key(message: &mut Vec<u8>, field: u64, wire: u64) {
    put_raw_varint(message, field << 3 | wire);
}

fn put_varint(message: &mut Vec<u8>, field: u64, value: u64) {
    put_key(message, field, WIRE_VARINT);
    put_raw_varint(message, value);
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(message, field, WIRE_BYTES);
    put_raw_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

/// CRCs of data that itself holds CRCs are weak, hence the rotation and the constant (TensorFlow, `crc32c.h`).
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The machine's name, fit for a file name.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .unwrap_or_default();
    let fit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = name.trim().chars().filter(|&c| fit(c)).take(64).collect();
    if name.is_empty() { "localhost".into() } else { name }
}

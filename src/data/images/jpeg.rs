//! Decodes JPEG bit for bit as Pillow does: libjpeg-turbo with the accurate integer DCT and interpolated chroma.
//!
//! The library is the decoder in MozJPEG, which is libjpeg-turbo's. As in Pillow, truncated data is an error, and
//! damage that only causes a warning in the library is accepted.

use std::ffi::{c_int, c_long};
use std::mem::MaybeUninit;

use image::metadata::Orientation;
use mozjpeg_sys::{
    J_COLOR_SPACE, boolean, jpeg_CreateDecompress, jpeg_common_struct, jpeg_decompress_struct, jpeg_destroy_decompress,
    jpeg_error_mgr, jpeg_finish_decompress, jpeg_read_header, jpeg_read_scanlines, jpeg_resync_to_restart,
    jpeg_source_mgr, jpeg_start_decompress, jpeg_std_error,
};

/// The first bytes of every JPEG.
const START: [u8; 3] = [0xff, 0xd8, 0xff];
/// Return value of `jpeg_read_header` for a complete header.
const HEADER_OK: c_int = 1;
const TRUE: boolean = 1;
const FALSE: boolean = 0;

/// A decoded JPEG before its orientation is applied. `rgb` is `[height, width, 3]`.
pub(super) struct Jpeg {
    pub width: usize,
    pub height: usize,
    pub rgb: Vec<u8>,
}

pub(super) fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&START)
}

/// The orientation in the EXIF block; `NoTransforms` without one.
pub(super) fn orientation(bytes: &[u8]) -> Orientation {
    let mut rest = bytes.get(2..).unwrap_or_default();
    while let [0xff, marker, tail @ ..] = rest {
        match marker {
            // Fill bytes before a marker.
            0xff => {
                rest = rest.get(1..).unwrap_or_default();
                continue;
            }
            0x01 | 0xd0..=0xd8 => {
                rest = tail;
                continue;
            }
            // Start of the entropy-coded data, or end of the picture.
            0xd9 | 0xda => break,
            _ => {}
        }
        let [high, low, ..] = tail else { break };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let Some(body) = tail.get(2..length) else { break };
        if *marker == 0xe1
            && let Some(exif) = body.strip_prefix(b"Exif\0\0")
            && let Some(orientation) = Orientation::from_exif_chunk(exif)
        {
            return orientation;
        }
        rest = tail.get(length..).unwrap_or_default();
    }
    Orientation::NoTransforms
}

/// Decodes to RGB. Calls `check` with the width and height before it allocates the pixels.
///
/// Errors: a message about the bytes, or the error of `check`. A fatal error of the library is a panic with the
/// library's message, so callers need `guarded`.
pub(super) fn decode(bytes: &[u8], check: impl FnOnce(usize, usize) -> Result<(), String>) -> Result<Jpeg, String> {
    let mut decoder = JpegDecoder::new(bytes);
    let cut = || "is a JPEG whose data end early".to_string();
    let info = decoder.info();
    // SAFETY: `JpegDecoder::new` created `info`, which does not move until it is destroyed; the same holds for the
    // calls below.
    if unsafe { jpeg_read_header(info, TRUE) } != HEADER_OK {
        return Err(cut());
    }
    let (width, height) = (info.image_width as usize, info.image_height as usize);
    check(width, height)?;
    info.out_color_space = match info.num_components {
        1 => J_COLOR_SPACE::JCS_GRAYSCALE,
        3 => J_COLOR_SPACE::JCS_RGB,
        4 => J_COLOR_SPACE::JCS_CMYK,
        other => return Err(format!("is a JPEG of {other} components, expected 1, 3 or 4")),
    };
    let channels = info.num_components as usize;
    // SAFETY: as above.
    if unsafe { jpeg_start_decompress(info) } == FALSE {
        return Err(cut());
    }
    if (info.output_width as usize, info.output_height as usize, info.output_components as usize)
        != (width, height, channels)
    {
        return Err("is a JPEG that decodes to another size than its header says".into());
    }
    let mut samples = vec![0u8; width * height * channels];
    for row in samples.chunks_exact_mut(width * channels) {
        let mut rows = [row.as_mut_ptr()];
        // SAFETY: as above; one row of `output_width * output_components` bytes is writable.
        if unsafe { jpeg_read_scanlines(info, rows.as_mut_ptr(), 1) } != 1 {
            return Err(cut());
        }
    }
    // SAFETY: as above. Pillow accepts a picture that has all rows but no end marker.
    unsafe { jpeg_finish_decompress(info) };
    let rgb = match channels {
        1 => samples.iter().flat_map(|&grey| [grey; 3]).collect(),
        3 => samples,
        _ => samples.chunks_exact(4).flat_map(|ink| from_inverted_cmyk([ink[0], ink[1], ink[2], ink[3]])).collect(),
    };
    Ok(Jpeg { width, height, rgb })
}

/// Converts inverted CMYK to RGB as Pillow does. Adobe stores inks inverted, and Pillow reads every JPEG of four
/// components in this way.
fn from_inverted_cmyk([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    let white = i32::from(black);
    [cyan, magenta, yellow].map(|ink| {
        let product = (255 - i32::from(ink)) * white + 128;
        (white - (((product >> 8) + product) >> 8)).clamp(0, 255) as u8
    })
}

/// The library's state. It holds pointers into itself and into the bytes.
struct JpegDecoder<'a> {
    state: Box<JpegState>,
    _bytes: &'a [u8],
}

struct JpegState {
    info: MaybeUninit<jpeg_decompress_struct>,
    errors: jpeg_error_mgr,
    source: jpeg_source_mgr,
}

impl<'a> JpegDecoder<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let source = jpeg_source_mgr {
            next_input_byte: bytes.as_ptr(),
            bytes_in_buffer: bytes.len(),
            init_source: Some(nothing),
            fill_input_buffer: Some(no_more),
            skip_input_data: Some(skip),
            resync_to_restart: Some(jpeg_resync_to_restart),
            term_source: Some(nothing),
        };
        // SAFETY: zeros are valid for both, which are plain data: numbers, null pointers and absent functions.
        let (info, mut errors) = unsafe { (MaybeUninit::zeroed(), std::mem::zeroed::<jpeg_error_mgr>()) };
        // SAFETY: `jpeg_std_error` fills the fields of `errors`.
        unsafe { jpeg_std_error(&mut errors) };
        errors.error_exit = Some(give_up);
        errors.emit_message = Some(silent);
        let mut state = Box::new(JpegState { info, errors, source });
        let info = state.info.as_mut_ptr();
        // SAFETY: `info` points to zeroed memory in the box. The error manager and the source are in the same box and
        // do not move while the decoder exists.
        unsafe {
            (*info).common.err = &raw mut state.errors;
            jpeg_CreateDecompress(info, mozjpeg_sys::JPEG_LIB_VERSION, size_of::<jpeg_decompress_struct>());
            (*info).src = &raw mut state.source;
        }
        JpegDecoder { state, _bytes: bytes }
    }

    fn info(&mut self) -> &mut jpeg_decompress_struct {
        // SAFETY: `new` initialised it.
        unsafe { self.state.info.assume_init_mut() }
    }
}

impl Drop for JpegDecoder<'_> {
    fn drop(&mut self) {
        // SAFETY: `new` initialised it, and nothing uses it afterwards.
        unsafe { jpeg_destroy_decompress(self.info()) };
    }
}

unsafe extern "C-unwind" fn nothing(_: &mut jpeg_decompress_struct) {}

/// The source holds all bytes from the start, so there are none to add. The library suspends at the end of the bytes.
unsafe extern "C-unwind" fn no_more(_: &mut jpeg_decompress_struct) -> boolean {
    FALSE
}

unsafe extern "C-unwind" fn skip(info: &mut jpeg_decompress_struct, count: c_long) {
    // SAFETY: `src` is the source that `JpegDecoder::new` set; the pointer moves within the bytes.
    unsafe {
        let source = &mut *info.src;
        let count = usize::try_from(count).unwrap_or(0).min(source.bytes_in_buffer);
        source.next_input_byte = source.next_input_byte.add(count);
        source.bytes_in_buffer -= count;
    }
}

unsafe extern "C-unwind" fn silent(_: &mut jpeg_common_struct, _: c_int) {}

unsafe extern "C-unwind" fn give_up(info: &mut jpeg_common_struct) {
    let mut buffer = [0u8; 80];
    // SAFETY: `err` is the error manager that `JpegDecoder::new` set; `format_message` writes at most 80 bytes.
    unsafe {
        if let Some(format) = (*info.err).format_message {
            let place = &raw mut buffer;
            format(info, &*place);
        }
    }
    let text = buffer.split(|&byte| byte == 0).next().unwrap_or_default();
    panic!("{}", String::from_utf8_lossy(text));
}

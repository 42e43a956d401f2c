//! JPEG as Pillow decodes it: libjpeg-turbo with the accurate integer transform and interpolated chroma, to the bit.
//!
//! The library is the decoder inside MozJPEG, which is libjpeg-turbo's. A picture whose data end early is an error, as it is
//! in Pillow; damage that the library only warns of is accepted, as there.

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
/// What `jpeg_read_header` answers when the header is complete.
const HEADER_OK: c_int = 1;
const TRUE: boolean = 1;
const FALSE: boolean = 0;

/// A decoded JPEG before its orientation is applied.
pub(super) struct Jpeg {
    pub width: usize,
    pub height: usize,
    pub rgb: Vec<u8>,
}

pub(super) fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&START)
}

/// How the EXIF block says that the picture is turned; no turn without one.
pub(super) fn orientation(bytes: &[u8]) -> Orientation {
    let mut rest = bytes.get(2..).unwrap_or_default();
    while let [0xff, marker, tail @ ..] = rest {
        match marker {
            // Fill bytes stand before a marker.
            0xff => {
                rest = rest.get(1..).unwrap_or_default();
                continue;
            }
            0x01 | 0xd0..=0xd8 => {
                rest = tail;
                continue;
            }
            // The entropy-coded data begin, or the picture ends.
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

/// Decodes to RGB. `check` sees width and height before anything of that size is allocated.
///
/// Errors: what is wrong with the bytes. Panics with the library's message when it gives up, so callers hold it in
/// `guarded`.
pub(super) fn decode(bytes: &[u8], check: impl FnOnce(usize, usize) -> Result<(), String>) -> Result<Jpeg, String> {
    let mut decoder = JpegDecoder::new(bytes);
    let cut = || "is a JPEG whose data end early".to_string();
    let info = decoder.info();
    // SAFETY: `info` was created by `JpegDecoder::new` and is not moved until it is destroyed; the same holds for the calls below.
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
    // SAFETY: as above. Pillow takes a picture whose last row is there even without an end marker.
    unsafe { jpeg_finish_decompress(info) };
    let rgb = match channels {
        1 => samples.iter().flat_map(|&grey| [grey; 3]).collect(),
        3 => samples,
        _ => samples.chunks_exact(4).flat_map(|ink| from_inverted_cmyk([ink[0], ink[1], ink[2], ink[3]])).collect(),
    };
    Ok(Jpeg { width, height, rgb })
}

/// Adobe stores inks inverted, and so Pillow takes every JPEG of four components; then its conversion to RGB.
fn from_inverted_cmyk([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    let white = i32::from(black);
    [cyan, magenta, yellow].map(|ink| {
        let product = (255 - i32::from(ink)) * white + 128;
        (white - (((product >> 8) + product) >> 8)).clamp(0, 255) as u8
    })
}

/// The library's state, which holds pointers into itself and into the bytes.
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
        // SAFETY: both are plain data for which zeros are valid: numbers, null pointers and absent functions.
        let (info, mut errors) = unsafe { (MaybeUninit::zeroed(), std::mem::zeroed::<jpeg_error_mgr>()) };
        // SAFETY: fills in the fields of `errors`.
        unsafe { jpeg_std_error(&mut errors) };
        errors.error_exit = Some(give_up);
        errors.emit_message = Some(silent);
        let mut state = Box::new(JpegState { info, errors, source });
        let info = state.info.as_mut_ptr();
        // SAFETY: `info` points to zeroed memory of its own; the error manager and the source stay where they are in the box for as
        // long as the decoder lives.
        unsafe {
            (*info).common.err = &raw mut state.errors;
            jpeg_CreateDecompress(info, mozjpeg_sys::JPEG_LIB_VERSION, size_of::<jpeg_decompress_struct>());
            (*info).src = &raw mut state.source;
        }
        JpegDecoder { state, _bytes: bytes }
    }

    fn info(&mut self) -> &mut jpeg_decompress_struct {
        // SAFETY: `new` made it.
        unsafe { self.state.info.assume_init_mut() }
    }
}

impl Drop for JpegDecoder<'_> {
    fn drop(&mut self) {
        // SAFETY: `new` made it, and nothing uses it afterwards.
        unsafe { jpeg_destroy_decompress(self.info()) };
    }
}

unsafe extern "C-unwind" fn nothing(_: &mut jpeg_decompress_struct) {}

/// All bytes are there from the start; the library stops where it is when they end.
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

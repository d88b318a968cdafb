package kernel

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// maxKernel bounds what an unpacked kernel may need in memory; Debian's are about 60 MiB.
const maxKernel = 1 << 30

// Offsets in the x86 boot sector and setup header, from the kernel's Documentation/arch/x86/boot.rst.
const (
	hdrSetupSects    = 0x1f1
	hdrMagic         = 0x202
	hdrVersion       = 0x206
	hdrKernelVersion = 0x20e
	hdrPayloadOffset = 0x248
	hdrPayloadLength = 0x24c
	hdrEnd           = 0x250
)

// Unpack gives the ELF kernel (vmlinux) of an x86 kernel image: image itself if it is one, else
// the compressed payload of a bzImage (boot protocol 2.08 or later). What cannot be read is fault.Corrupt,
// a compression that cannot be undone here is fault.Unsupported.
func Unpack(image []byte, subject string) ([]byte, error) {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		return image, checkELF(image, subject)
	}
	if len(image) < hdrEnd || string(image[hdrMagic:hdrMagic+4]) != "HdrS" {
		return nil, fault.New(fault.Corrupt, subject, "is neither an ELF kernel nor a bzImage")
	}
	le := binary.LittleEndian
	if v := le.Uint16(image[hdrVersion:]); v < 0x208 {
		return nil, fault.New(fault.Unsupported, subject, "has boot protocol %d.%02d; 2.08 is the first that says where the kernel lies", v>>8, v&0xff)
	}
	start := setupSize(image) + int64(le.Uint32(image[hdrPayloadOffset:]))
	end := start + int64(le.Uint32(image[hdrPayloadLength:]))
	if start >= end || end > int64(len(image)) {
		return nil, fault.New(fault.Corrupt, subject, "is cut short: the kernel ends at byte %d of %d", end, len(image))
	}
	vmlinux, err := expand(image[start:end], subject)
	if err != nil {
		return nil, err
	}
	return vmlinux, checkELF(vmlinux, subject)
}

// Version gives the release of a kernel image ("6.12.9-cloud-amd64"), as uname -r says it, from a
// bzImage's header or from the banner in an ELF kernel.
func Version(image []byte, subject string) (string, error) {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		banner := []byte("Linux version ")
		for at := image; ; {
			i := bytes.Index(at, banner)
			if i < 0 {
				return "", fault.New(fault.Corrupt, subject, "holds no kernel version")
			}
			at = at[i+len(banner):]
			// "%s" of the format string for /proc/version comes first in some kernels.
			if v := firstWord(at); v != "" && v[0] >= '0' && v[0] <= '9' {
				return v, nil
			}
		}
	}
	if len(image) >= hdrEnd && string(image[hdrMagic:hdrMagic+4]) == "HdrS" {
		// The field is relative to the end of the boot sector.
		if at := 0x200 + int(binary.LittleEndian.Uint16(image[hdrKernelVersion:])); at > 0x200 && at < len(image) {
			if v := firstWord(image[at:]); v != "" {
				return v, nil
			}
		}
	}
	return "", fault.New(fault.Corrupt, subject, "holds no kernel version")
}

// firstWord gives the text up to a space or NUL, at most 64 bytes (UTS_RELEASE's own limit).
func firstWord(b []byte) string {
	b = b[:min(len(b), 65)]
	if i := bytes.IndexAny(b, " \x00\n"); i >= 0 {
		return string(b[:i])
	}
	return ""
}

// setupSize is the length of the real-mode part; 0 sectors means 4, for historical reasons.
func setupSize(image []byte) int64 {
	n := int64(image[hdrSetupSects])
	if n == 0 {
		n = 4
	}
	return (n + 1) * 512
}

// expand undoes the compression of a payload. The kernel's build appends the unpacked size, four
// bytes, to every format but gzip, whose own trailer holds it.
func expand(payload []byte, subject string) ([]byte, error) {
	var (
		r   io.Reader
		err error
	)
	sized := payload[:max(0, len(payload)-4)]
	switch {
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		var g *gzip.Reader
		if g, err = gzip.NewReader(bytes.NewReader(payload)); err == nil {
			g.Multistream(false) // padding may follow
			r = g
		}
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var z *zstd.Decoder
		// The kernel is compressed with a window of up to 128 MiB (zstd -22 --ultra).
		if z, err = zstd.NewReader(bytes.NewReader(sized), zstd.WithDecoderMaxWindow(128<<20)); err == nil {
			defer z.Close()
			r = z
		}
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		r = lz4.NewReader(bytes.NewReader(sized))
	case bytes.HasPrefix(payload, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		r, err = xz.ReaderConfig{SingleStream: true}.NewReader(bytes.NewReader(sized))
	case bytes.HasPrefix(payload, []byte(elf.ELFMAG)):
		return payload, nil // CONFIG_KERNEL_UNCOMPRESSED
	default:
		return nil, fault.New(fault.Unsupported, subject, "is compressed in a way banger does not know (% x)", payload[:min(4, len(payload))]).
			WithHint("unpack it with the kernel's scripts/extract-vmlinux and give the result")
	}
	if err == nil {
		var out bytes.Buffer
		if len(payload) > 4 {
			out.Grow(int(min(binary.LittleEndian.Uint32(payload[len(payload)-4:]), maxKernel)))
		}
		if _, err = io.Copy(&out, io.LimitReader(r, maxKernel)); err == nil {
			return out.Bytes(), nil
		}
	}
	return nil, fault.Wrap(err, fault.Corrupt, subject, "holds a kernel that cannot be unpacked").
		WithHint("unpack it with the kernel's scripts/extract-vmlinux and give the result")
}

// checkELF says whether a VMM can load the kernel: an x86-64 executable, complete.
func checkELF(b []byte, subject string) error {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return fault.Wrap(err, fault.Corrupt, subject, "holds no ELF kernel")
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		return fault.New(fault.Unsupported, subject, "is an ELF file for %v (%v), not an x86-64 kernel", f.Machine, f.Type)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Off+p.Filesz > uint64(len(b)) {
			return fault.New(fault.Corrupt, subject, "is cut short: a segment ends at byte %d of %d", p.Off+p.Filesz, len(b))
		}
	}
	return nil
}

package qemu

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"
)

// tinyKernel writes a kernel of a few bytes that QEMU starts like a real vmlinux (PVH: an ELF with a
// Xen note that names a 32-bit entry point; QEMU passes the command line in a structure at EBX).
// It prints its command line on the serial port, then does what the first letter says: p powers
// off, r resets, anything else sleeps for ever. With it, everything about a QEMU process is tested
// in a second, without a distribution's kernel.
func tinyKernel(t *testing.T, path string) {
	t.Helper()
	code := []byte{
		0x8b, 0x73, 0x18, //             mov esi, [ebx+24]     hvm_start_info.cmdline_paddr
		0x66, 0xba, 0xf8, 0x03, //       mov dx, 0x3f8         COM1
		0xac,       //             next: lodsb
		0x84, 0xc0, //                   test al, al
		0x74, 0x03, //                   jz newline
		0xee,       //                   out dx, al
		0xeb, 0xf8, //                   jmp next
		0xb0, 0x0a, //          newline: mov al, 10
		0xee,             //             out dx, al
		0x8b, 0x73, 0x18, //             mov esi, [ebx+24]
		0x8a, 0x06, //                   mov al, [esi]
		0x3c, 'p', //                    cmp al, 'p'
		0x75, 0x0a, //                   jne reset
		0x66, 0xba, 0x04, 0x06, //       mov dx, 0x604         q35's ACPI PM1a control, as SeaBIOS sets it
		0x66, 0xb8, 0x00, 0x20, //       mov ax, 0x2000        SLP_EN, S5
		0x66, 0xef, //                   out dx, ax
		0x3c, 'r', //             reset: cmp al, 'r'
		0x75, 0x07, //                   jne sleep
		0x66, 0xba, 0xf9, 0x0c, //       mov dx, 0xcf9         PCH reset control
		0xb0, 0x06, //                   mov al, 6             full reset
		0xee,       //             out dx, al
		0xfa,       //      sleep: cli
		0xf4,       //             hlt
		0xeb, 0xfc, //                   jmp sleep
	}
	const (
		load   = 0x100000 // physical address of the code
		offset = 0x1000   // of the code in the file
		notes  = 0x200    // offset of the note
	)
	var note bytes.Buffer
	put := func(b *bytes.Buffer, v ...any) {
		for _, v := range v {
			if err := binary.Write(b, binary.LittleEndian, v); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(&note, uint32(4), uint32(8), uint32(18), [4]byte{'X', 'e', 'n'}, uint64(load)) // XEN_ELFNOTE_PHYS32_ENTRY

	var elf bytes.Buffer
	elf.WriteString("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00") // 64-bit, little endian, like a vmlinux
	put(&elf, uint16(2), uint16(62), uint32(1), uint64(load), uint64(64), uint64(0), uint32(0),
		uint16(64), uint16(56), uint16(2), uint16(64), uint16(0), uint16(0))
	size := uint64(len(code))
	put(&elf, uint32(1), uint32(7), uint64(offset), uint64(load), uint64(load), size, size, uint64(0x1000)) // PT_LOAD
	size = uint64(note.Len())
	put(&elf, uint32(4), uint32(4), uint64(notes), uint64(0), uint64(0), size, size, uint64(4)) // PT_NOTE

	file := make([]byte, offset+len(code))
	copy(file, elf.Bytes())
	copy(file[notes:], note.Bytes())
	copy(file[offset:], code)
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
}

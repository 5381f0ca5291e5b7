-- An attempt's own event. Idempotent by its sequence number. Returns 1, or 0 when the attempt is no longer the current one.
-- ARGV: id, token, seq, status, description, log_lines
local id, token, seq, status, description = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local f = fields(id, 'token', 'seq', 'state')
if f[1] ~= token or f[3] ~= 'claimed' then return 0 end
if seq <= tonumber(f[2] or '0') then return 1 end
redis.call('HSET', k_request(id), 'seq', seq)
if status == 'LOG' then
  local limit = tonumber(ARGV[6])
  local lines = redis.call('HINCRBY', k_request(id), 'log_lines', 1)
  if lines > limit + 1 then return 1 end
  if lines == limit + 1 then description = 'Further printed lines are dropped: the limit is ' .. limit .. '.' end
end
emit(id, now_ms(), status, description)
return 1

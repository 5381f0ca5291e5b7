-- Renew leases. Returns a list of verdicts: 'ok', 'cancel' (end it), 'lost' (kill it: the request is somebody else's).
-- ARGV: lease_ms, id, token, id, token...
local lease, now = tonumber(ARGV[1]), now_ms()
local verdicts = {}
for i = 2, #ARGV, 2 do
  local id, token = ARGV[i], ARGV[i + 1]
  local f = fields(id, 'token', 'state', 'cancel')
  if f[1] == token and f[2] == 'claimed' then
    redis.call('ZADD', LEASES, now + lease, id)
    verdicts[#verdicts + 1] = f[3] and 'cancel' or 'ok'
  else
    verdicts[#verdicts + 1] = 'lost'
  end
end
return verdicts
